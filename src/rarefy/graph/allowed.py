"""Which operators a stored graph may call: an allow-list, since a file may be hostile.

An operator is allowed when it computes tensors or sizes from tensors and sizes, with arguments
that PyTorch checks. The list leaves out on purpose whatever touches files (``from_file``,
``save``), global state (``manual_seed``, ``set_grad_enabled``), storages (``set_``, ``resize_``,
``as_strided``, ``empty``), tensors that hold packed pointers (``fbgemm_*``, ``quantized_*``),
backward passes and helpers that trust their indices. Running an allowed graph can still use as
much time and memory as the sizes written in it.
"""

from __future__ import annotations

import re
from functools import cache

import torch

from rarefy.errors import FormatError
from rarefy.graph.declarations import SCALAR_OPS, kind, resolve

_POINTWISE = """
abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2
arctanh asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or
bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip conj conj_physical
copysign cos cosh deg2rad digamma div divide elu eq erf erfc erfinv exp exp2 expm1 fix
float_power floor floor_divide fmax fmin fmod frac ge gelu glu greater greater_equal gt hardshrink
hardsigmoid hardswish hardtanh heaviside hypot i0 imag isclose isfinite isinf isnan isneginf
isposinf isreal le leaky_relu lerp less less_equal lgamma log log10 log1p log2 log_sigmoid
logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum
minimum mish mul multiply nan_to_num ne neg negative nextafter not_equal polygamma positive pow
prelu rad2deg real reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign
signbit silu sin sinc sinh softplus softshrink special_digamma special_entr
special_erf special_erfc special_erfcx
special_erfinv special_exp2 special_expit special_expm1 special_gammaln special_i0e special_i1
special_log1p special_log_ndtr special_logit special_ndtr special_ndtri special_round special_sinc
special_multigammaln special_polygamma special_psi special_xlogy special_xlog1py sqrt square sub
subtract tan tanh threshold true_divide trunc where xlogy
__and__ __or__ __xor__ __lshift__ __rshift__ fake_quantize_per_tensor_affine
fake_quantize_per_channel_affine fake_quantize_per_tensor_affine_cachemask
fake_quantize_per_channel_affine_cachemask
"""

_REDUCTIONS = """
all amax amin aminmax any argmax argmin argsort bincount count_nonzero cummax cummin cumprod
cumsum diff dist equal frobenius_norm histc kthvalue linalg_matrix_norm linalg_norm
linalg_vector_norm log_softmax logcumsumexp logsumexp max mean median min mode msort nanmean
nanmedian nanquantile nansum nonzero norm prod quantile softmax sort special_log_softmax
special_logsumexp special_softmax std std_mean sum topk trapezoid unique_consecutive unique_dim
var var_mean _log_softmax _softmax
"""

_CONTRACTIONS = """
addbmm addmm addmv addr baddbmm bilinear bmm cdist chain_matmul conv1d conv2d conv3d
conv_transpose1d conv_transpose2d conv_transpose3d convolution cosine_similarity cross dot einsum
ger inner kron linalg_cross linalg_det linalg_eigh linalg_inv linalg_matmul linalg_matrix_power
linalg_multi_dot linalg_pinv linalg_qr linalg_slogdet linalg_solve linalg_svd linalg_vecdot linear
matmul matrix_power mm mv outer pairwise_distance scaled_dot_product_attention tensordot vdot
gru lstm rnn_relu rnn_tanh gru_cell lstm_cell rnn_relu_cell rnn_tanh_cell embedding embedding_bag
_convolution_mode fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn
fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fft_fftfreq
fft_rfftfreq stft istft
"""

_NORMS_AND_POOLS = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d affine_grid_generator alpha_dropout avg_pool1d avg_pool2d
avg_pool3d batch_norm channel_shuffle dropout feature_alpha_dropout
feature_dropout fractional_max_pool2d fractional_max_pool3d grid_sampler grid_sampler_2d
grid_sampler_3d group_norm instance_norm layer_norm max_pool1d
max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices
max_unpool2d max_unpool3d native_batch_norm native_channel_shuffle native_dropout
native_group_norm native_layer_norm pixel_shuffle pixel_unshuffle renorm rms_norm
upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_trilinear3d _adaptive_avg_pool2d _adaptive_avg_pool3d
_native_batch_norm_legit _native_batch_norm_legit_no_training _upsample_bicubic2d_aa
_upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d _weight_norm binary_cross_entropy binary_cross_entropy_with_logits
cosine_embedding_loss cross_entropy_loss hinge_embedding_loss huber_loss kl_div l1_loss
margin_ranking_loss mse_loss nll_loss nll_loss2d nll_loss_nd poisson_nll_loss smooth_l1_loss
soft_margin_loss triplet_margin_loss
"""

_VIEWS_AND_COPIES = """
adjoint alias atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to
cartesian_prod cat chunk clone col2im column_stack combinations concat concatenate
constant_pad_nd contiguous copy cov detach detach_copy diag diag_embed diagonal dsplit dstack
expand expand_as expand_copy fill flatten flip fliplr flipud full full_like gather
hsplit hstack im2col index index_add index_copy index_fill index_put index_reduce index_select
isin lift_fresh lift_fresh_copy masked_scatter masked_select matrix_H meshgrid moveaxis movedim mT
narrow new_full new_ones new_zeros nonzero_numpy numpy_T one_hot ones ones_like pad permute
permute_copy put ravel reflection_pad1d reflection_pad2d reflection_pad3d repeat
repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape reshape_as
resolve_conj resolve_neg roll rot90 scatter scatter_add scatter_reduce searchsorted select
select_copy select_scatter slice slice_copy slice_scatter split split_with_sizes squeeze
squeeze_copy stack swapaxes swapdims t t_copy take take_along_dim tensor_split tile transpose
transpose_copy tril triu unbind unflatten unfold unsafe_chunk unsafe_split
unsafe_split_with_sizes unsqueeze unsqueeze_copy view view_as view_as_complex view_as_real
view_copy vsplit vstack zero zeros zeros_like _reshape_alias_copy _unsafe_view _to_copy to type_as
arange bartlett_window blackman_window bucketize eye hann_window hamming_window kaiser_window
linspace logspace mH row_stack scalar_tensor tril_indices
triu_indices bernoulli multinomial normal rand rand_like randint randint_like randn randn_like
randperm polar complex trapz vander
"""

_SIZES_AND_CHECKS = """
item _local_scalar_dense numel size sym_numel sym_size sym_storage_offset sym_stride
sym_constrain_range sym_constrain_range_for_size _assert_async _assert_scalar
_assert_tensor_metadata _functional_assert_async _functional_assert_scalar
"""

_FAMILIES = (
    _POINTWISE,
    _REDUCTIONS,
    _CONTRACTIONS,
    _NORMS_AND_POOLS,
    _VIEWS_AND_COPIES,
    _SIZES_AND_CHECKS,
)

ALLOWED: frozenset[str] = frozenset(" ".join(_FAMILIES).split())
"""Base names of ATen operators; the in-place form ``name_`` of each is allowed with it."""

_PLAIN_TYPES = frozenset(
    "Tensor int float bool complex number str Device Generator List Optional".split()
)
"""Types of arguments, as schemas print them, that are data."""


@cache
def check_operator(op: str) -> None:
    """Pass where a stored graph may call ``op``.

    Raises:
        FormatError: the operator is unknown to this PyTorch, or not on the allow-list.

    Example:
        >>> check_operator("aten.conv2d.default")
    """
    function = resolve(op)
    if op in SCALAR_OPS:
        return
    assert isinstance(function, torch._ops.OpOverload)
    name = kind(op)
    plain = all(
        not argument.is_out and _PLAIN_TYPES.issuperset(re.findall(r"\w+", str(argument.type)))
        for argument in function._schema.arguments
    )
    own = op.startswith("aten.") and {name, name.removesuffix("_")} & ALLOWED
    if not plain or not own:
        raise FormatError(
            f"operator {op!r}",
            "it is not among the operators that a stored graph may call",
            "Save the module itself instead of its captured graph, or compute this step outside",
        )
