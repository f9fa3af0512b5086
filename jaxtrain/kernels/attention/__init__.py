from jaxtrain.kernels.attention.choice import Choice as Choice
from jaxtrain.kernels.attention.choice import choose as choose
from jaxtrain.kernels.attention.entry import attention as attention
from jaxtrain.kernels.attention.rule import Places as Places
