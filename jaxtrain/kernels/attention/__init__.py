from jaxtrain.kernels.attention.api import attention as attention
from jaxtrain.kernels.attention.dispatch import Choice as Choice
from jaxtrain.kernels.attention.dispatch import choose as choose
from jaxtrain.kernels.attention.mask import TokenPositions as TokenPositions
