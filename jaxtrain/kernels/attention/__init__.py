from jaxtrain.kernels.attention.api import Device as Device
from jaxtrain.kernels.attention.api import Wanted as Wanted
from jaxtrain.kernels.attention.api import attention as attention
from jaxtrain.kernels.attention.api import choose as choose
from jaxtrain.kernels.attention.mask import Scoring as Scoring
from jaxtrain.kernels.attention.mask import TokenPositions as TokenPositions
