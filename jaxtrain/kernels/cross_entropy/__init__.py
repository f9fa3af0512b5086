from jaxtrain.kernels.cross_entropy.chunked import token_log_probs as token_log_probs
from jaxtrain.kernels.cross_entropy.chunked import weighted_nll as weighted_nll
from jaxtrain.kernels.cross_entropy.plan import NLL as NLL
from jaxtrain.kernels.cross_entropy.plan import HeadLayout as HeadLayout
