"""The networks of the zoo: family/name -> a function that builds a model and its example inputs.

Own small networks are in ``zoo_own``; those of torchvision, timm and transformers are made by
their libraries with random weights, small where the library allows it. Nothing is downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from zoo_own import OWN, Builder, Network

# --- torchvision -------------------------------------------------------------------------------

SKIPPED_TORCHVISION = ("quantized_",)
"""Names that hold no float weights."""

TORCHVISION_SIZES: Mapping[str, tuple[int, ...]] = {
    "inception_v3": (3, 96, 96),
    "ssd300": (3, 300, 300),
    "vit_h_14": (3, 56, 56),
    "maxvit": (3, 224, 224),
    "s3d": (3, 16, 224, 224),
    "r3d": (3, 6, 48, 48),
    "mc3": (3, 6, 48, 48),
    "r2plus1d": (3, 6, 48, 48),
    "swin3d": (3, 4, 64, 64),
    "mvit": (3, 16, 224, 224),
    "raft": (3, 128, 128),
}
"""Example shapes by the beginning of a name; others take (3, 64, 64)."""

TORCHVISION_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "vit_": {"image_size": 64},
    "vit_h_14": {"image_size": 56},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "googlenet": {"aux_logits": False, "init_weights": False},
}
"""Options by the beginning of a name; a later row goes before an earlier one."""


def _starting(table: Mapping[str, Any], name: str, default: Any) -> Any:
    found = [value for start, value in table.items() if name.startswith(start)]
    return found[-1] if found else default


def _torchvision(name: str) -> Network:
    from torchvision.models import detection, get_model, get_model_builder

    options = dict(_starting(TORCHVISION_OPTIONS, name, {}))
    module = inspect.getmodule(get_model_builder(name))
    if module is not None and module.__name__.startswith(detection.__name__):
        model = get_model(name, weights=None, weights_backbone=None).backbone
    elif "weights_backbone" in inspect.signature(get_model_builder(name)).parameters:
        model = get_model(name, weights=None, weights_backbone=None)
    else:
        model = get_model(name, weights=None, **options)
    x = torch.randn(2, *_starting(TORCHVISION_SIZES, name, (3, 64, 64)))
    return model, ((x, torch.randn_like(x)) if name.startswith("raft") else x)


def torchvision_networks() -> dict[str, Builder]:
    """Every model of torchvision with float weights; of detectors, the backbone."""
    try:
        from torchvision.models import list_models
    except ImportError:
        return {}
    names = [n for n in list_models() if not n.startswith(SKIPPED_TORCHVISION)]
    return {name: partial(_torchvision, name) for name in names}


# --- timm --------------------------------------------------------------------------------------

TIMM = """
aimv2_large_patch14_224:depth=2 bat_resnext26ts beit3_base_patch16_224:depth=2
beit_base_patch16_224:depth=2 beitv2_base_patch16_224:depth=2 botnet26t_256 caformer_s18
cait_xxs24_224:depth=4 coat_lite_tiny coat_tiny coatnet_nano_rw_224 coatnet_rmlp_nano_rw_224
coatnext_nano_rw_224 convformer_s18 convit_tiny:depth=4 convmixer_768_32 convnext_atto
convnext_atto_ols convnext_zepto_rms convnextv2_atto cpubone_nano crossvit_9_240
crossvit_9_dagger_240 cs3darknet_focus_s cs3sedarknet_l csatv2_21m cspdarknet53 cspnext_tiny
cspresnet50 cspresnext50 darknet17 darknetaa53 davit_tiny deit3_small_patch16_224:depth=2
deit_tiny_distilled_patch16_224:depth=2 deit_tiny_patch16_224 densenet121 densenetblur121d dla34
dla46x_c dla60_res2net dm_nfnet_f0 dpn48b dpn68 eca_botnext26ts_256 eca_halonext26ts eca_nfnet_l0
eca_resnext26ts eca_vovnet39b ecaresnet26t ecaresnext26t_32x4d edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_b0_gn efficientnet_cc_b0_4e
efficientnet_es efficientnet_lite0 efficientnetv2_rw_t efficientvim_m1 efficientvit_b0
efficientvit_l1 efficientvit_m0 ese_vovnet19b_dw ese_vovnet19b_slim eva02_tiny_patch14_224:depth=2
fasternet_t0 fastvit_mci0 fastvit_t8 fbnetc_100 fbnetv3_b flexivit_small:depth=2 focalnet_tiny_srf
gcresnet33ts gcresnext26ts gcvit_xxtiny gernet_s ghostnet_050 ghostnetv2_100 ghostnetv3_050
gmixer_12_224 gmlp_ti16_224 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224
hieradet_small hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3
inception_v4 lambda_resnet26t lcnet_050 lcnetv2_small legacy_seresnet18 legacy_seresnext26_32x4d
legacy_xception levit_128s levit_conv_128s lowformer_b0 mambaout_femto maxvit_rmlp_pico_rw_256
maxxvit_rmlp_nano_rw_256 mixer_s32_224 mixnet_s mnasnet_small mobilenet_edgetpu_v2_xs
mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small
mobilenetv4_hybrid_medium mobilenetv5_base mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
naflexvit_base_patch16_gap:depth=2 nasnetalarge nest_tiny nextvit_small nf_regnet_b0 nf_resnet26
pit_ti_224 pnasnet5large poolformer_s12 poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m:depth=2
rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnetz_b16 regnetz_b16_evos repghostnet_050
repvgg_a0 repvit_m0_9 res2net50_14w_8s res2next50 resmlp_12_224 resnest14d resnet10t resnet18
resnet18d resnet26t resnet50_gn resnetaa34d resnetblur18 resnetrs50 resnetv2_18 resnetv2_50d_evos
resnetv2_50d_frn resnetv2_50x1_bit resnext26ts rexnet_100 rexnetr_100 sam2_hiera_tiny
samvit_base_patch16_224:depth=2 sebotnet33ts_256 sedarknet21 selecsls42b semnasnet_075
sequencer2d_s seresnet33ts seresnext26ts shvit_s1 skresnet18 skresnext50_32x4d spnasnet_100
starnet_s1 swiftformer_xs swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256 test_byobnet test_convnext test_efficientnet test_nfnet test_resnet
test_vit test_vit2 test_vit3 tf_efficientnetv2_b0 tf_mixnet_s tf_mobilenetv3_small_minimal_100
tiny_vit_5m_224 tinynet_e tnt_s_patch16_224:depth=2 tresnet_m twins_pcpvt_small twins_svt_small
vgg11 visformer_tiny vit_base_r50_s16_224:depth=2 vit_little_patch16_reg4_gap_256:depth=2
vit_relpos_small_patch16_224:depth=2 vit_small_patch16_dinov3:depth=2
vit_small_patch16_rope_224:depth=2 vit_small_r26_s32_224:depth=2
vit_srelpos_small_patch16_224:depth=2 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224:depth=2
vit_xsmall_patch16_clip_224:depth=2 vitamin_small_224 volo_d1_224 vovnet39a wide_resnet50_2
xception41 xcit_nano_12_p16_224
""".split()
"""A small variant of each family, with options that make it smaller after the colon."""


SIDES = (64, 128)
"""Image sizes to try before a model's own, where that is not fixed."""


def _timm(row: str) -> Network:
    import timm

    name, _, option = row.partition(":")
    options: dict[str, Any] = {k: int(value) for k, _, value in [option.partition("=")] if k}
    model: Any = timm.create_model(name, pretrained=False, **options)
    settings = model.pretrained_cfg
    size = tuple(settings["input_size"])
    if not settings.get("fixed_input_size"):
        for side in SIDES:
            small = torch.randn(2, size[0], side, side)
            if side < size[-1] and _takes(model, small):
                return model, small
    return model, torch.randn(2, *size)


def _takes(model: nn.Module, x: Tensor) -> bool:
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(x)
    except Exception:  # noqa: BLE001 - a model may refuse a size in any way
        return False
    finally:
        model.train(training)
    return True


def timm_networks() -> dict[str, Builder]:
    """The rows of :data:`TIMM` that the installed version knows."""
    try:
        import timm
    except ImportError:
        return {}
    known = set(timm.list_models())
    return {
        row.partition(":")[0]: partial(_timm, row) for row in TIMM if row.partition(":")[0] in known
    }


# --- transformers ------------------------------------------------------------------------------

WORDS, LENGTH, SAMPLES = 97, 13, 1600

TINY: Mapping[str, Any] = {
    **dict.fromkeys("vocab_size text_vocab_size".split(), WORDS),
    **dict.fromkeys(
        "hidden_size d_model n_embd dim embedding_size embed_dim emb_dim model_dim".split(), 64
    ),
    **dict.fromkeys(
        "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers "
        "num_encoder_layers num_decoder_layers num_blocks".split(),
        2,
    ),
    **dict.fromkeys(
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads".split(),
        4,
    ),
    **dict.fromkeys("num_key_value_heads num_kv_heads".split(), 2),
    **dict.fromkeys("head_dim d_kv attention_head_size".split(), 16),
    **dict.fromkeys(
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim d_ff "
        "ffn_hidden_size d_inner shared_expert_intermediate_size n_inner".split(),
        96,
    ),
    **dict.fromkeys("moe_intermediate_size expert_dim".split(), 48),
    **dict.fromkeys("max_position_embeddings n_positions max_source_positions".split(), 40),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("projection_dim".split(), 32),
    **dict.fromkeys("num_experts_per_tok moe_k".split(), 2),
    "image_size": 64,
    "patch_size": 16,
    "rotary_dim": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "num_mel_bins": 16,
    "max_target_positions": 40,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
"""Attributes of configurations -> the small value that whole numbers among them take."""


def _tiny(config_class: type, extra: Mapping[str, Any]) -> Any:
    return config_class(**(_overrides(config_class()) | dict(extra)))


def _overrides(config: Any) -> dict[str, Any]:
    found = {
        name: value
        for name, value in TINY.items()
        if type(getattr(config, name, None)) is int
        and name not in config.attribute_map
        and not isinstance(getattr(type(config), name, None), property)
    }
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            found[name] = _overrides(part)
    return found


def _text() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, WORDS, (2, LENGTH))}


def _pair() -> dict[str, Tensor]:
    return {**_text(), "decoder_input_ids": torch.randint(3, WORDS, (2, 11))}


def _image(side: int = 64) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, side, side)}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, SAMPLES)}


def _masked_text() -> dict[str, Tensor]:
    return {**_text(), "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}


Make: TypeAlias = Callable[[], dict[str, Tensor]]
Row: TypeAlias = tuple[Make, Mapping[str, Any]]

STAGES = {"depths": [1, 1, 1], "embed_dim": 24, "num_heads": [2, 2, 4], "window_size": 4}
CONV = {
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
}
NO_CACHE = {"use_cache": False}

TRANSFORMERS: Mapping[str, Row] = {
    # encoders of text
    **{
        name: (_masked_text, {})
        for name in "bert roberta distilbert electra albert mpnet deberta deberta-v2 convbert fnet "
        "nystromformer roformer mobilebert layoutlm rembert ernie megatron-bert modernbert "
        "squeezebert xlm data2vec-text yoso mra splinter roc_bert flaubert xlm-roberta".split()
    },
    "esm": (_masked_text, {"vocab_size": WORDS, "pad_token_id": 1}),
    "mobilebert": (_masked_text, {"true_hidden_size": 32, "intra_bottleneck_size": 32}),
    "big_bird": (_masked_text, {"attention_type": "original_full"}),
    # decoders of text
    **dict.fromkeys(
        "gpt2 gpt_neox gptj opt bloom llama mistral qwen2 qwen3 gemma gemma2 "
        "gemma3_text phi phi3 falcon stablelm olmo olmo2 cohere starcoder2 codegen xglm biogpt "
        "granite smollm3 helium glm persimmon openai-gpt ctrl gpt_bigcode ernie4_5".split(),
        (_text, NO_CACHE),
    ),
    "gpt_neo": (_text, {**NO_CACHE, "attention_types": [[["global", "local"], 1]]}),
    "opt": (_text, {**NO_CACHE, "word_embed_proj_dim": 48}),
    "mpt": (_text, NO_CACHE),
    "nemotron": (_text, {**NO_CACHE, "num_key_value_heads": 2}),
    # mixtures of experts
    **dict.fromkeys(
        "mixtral qwen2_moe qwen3_moe olmoe phimoe granitemoe gpt_oss".split(), (_text, NO_CACHE)
    ),
    "deepseek_v3": (
        _text,
        {
            **NO_CACHE,
            "q_lora_rank": 24,
            "kv_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    "switch_transformers": (
        _pair,
        {**NO_CACHE, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    # state spaces and recurrence
    "mamba": (_text, {**NO_CACHE, "state_size": 8}),
    "mamba2": (_text, {**NO_CACHE, "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "falcon_mamba": (_text, {**NO_CACHE, "state_size": 8}),
    "rwkv": (_text, {**NO_CACHE, "attention_hidden_size": 64, "context_length": 40}),
    "recurrent_gemma": (_text, {**NO_CACHE, "lru_width": 64, "num_hidden_layers": 3}),
    # encoders and decoders
    **dict.fromkeys(
        "t5 mt5 bart mbart pegasus marian blenderbot m2m_100 longt5 umt5 plbart "
        "bigbird_pegasus blenderbot-small led".split(),
        (_pair, NO_CACHE),
    ),
    "prophetnet": (_pair, NO_CACHE),
    # vision
    **{name: (_image, {}) for name in "vit deit beit dinov2 vit_mae ijepa vit_msn".split()},
    "swin": (_image, {**STAGES, "patch_size": 4}),
    "swinv2": (_image, {**STAGES, "patch_size": 4}),
    "convnext": (
        _image,
        {"patch_size": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]},
    ),
    "convnextv2": (
        _image,
        {"patch_size": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]},
    ),
    "resnet": (
        _image,
        {"embedding_size": 16, "depths": [1, 1, 1, 1], "hidden_sizes": [32, 48, 64, 96]},
    ),
    "regnet": (
        _image,
        {
            "embedding_size": 16,
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [32, 48, 64, 96],
            "groups_width": 16,
        },
    ),
    "segformer": (
        _image,
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 24, 32, 48],
            "num_attention_heads": [1, 2, 2, 4],
            "patch_size": 7,
        },
    ),
    "poolformer": (
        _image,
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48], "patch_size": 7},
    ),
    "pvt_v2": (
        _image,
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 24, 32, 48],
            "num_attention_heads": [1, 2, 2, 4],
        },
    ),
    "mobilenet_v2": (_image, {"depth_multiplier": 0.35}),
    "mobilevit": (
        _image,
        {
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
            "patch_size": 2,
        },
    ),
    "focalnet": (_image, {"embed_dim": 24, "depths": [1, 1, 1, 1], "patch_size": 4}),
    "dpt": (_image, {"neck_hidden_sizes": [16, 24, 32, 48], "backbone_out_indices": [0, 0, 1, 1]}),
    "yolos": (_image, {"image_size": [64, 64]}),
    "timesformer": (lambda: {"pixel_values": torch.randn(2, 2, 3, 64, 64)}, {"num_frames": 2}),
    # audio
    **dict.fromkeys("wav2vec2 hubert wavlm unispeech data2vec-audio".split(), (_wave, CONV)),
    "sew": (_wave, {**CONV, "squeeze_factor": 2}),
    "wav2vec2-conformer": (_wave, CONV),
    "audio-spectrogram-transformer": (
        lambda: {"input_values": torch.randn(2, 40, 32)},
        {"num_mel_bins": 32, "max_length": 40},
    ),
    "whisper": (
        lambda: {
            "input_features": torch.randn(2, 16, 80),
            "decoder_input_ids": torch.randint(3, WORDS, (2, 11)),
        },
        NO_CACHE,
    ),
    "speech_to_text": (
        lambda: {
            "input_features": torch.randn(2, 52, 16),
            "decoder_input_ids": torch.randint(3, WORDS, (2, 11)),
        },
        {**NO_CACHE, "input_feat_per_channel": 16, "conv_channels": 48, "max_source_positions": 60},
    ),
    # several inputs
    **{
        name: (lambda: {**_masked_text(), **_image()}, {})
        for name in "clip siglip blip chinese_clip altclip vilt".split()
    },
    "clipseg": (lambda: {**_masked_text(), **_image()}, {}),
    "git": (lambda: {**_text(), **_image()}, NO_CACHE),
    # numbers
    "patchtst": (
        lambda: {"past_values": torch.randn(2, 32, 3)},
        {"num_input_channels": 3, "patch_length": 4, "patch_stride": 4},
    ),
    "patchtsmixer": (
        lambda: {"past_values": torch.randn(2, 32, 3)},
        {"num_input_channels": 3, "context_length": 32},
    ),
    "decision_transformer": (
        lambda: {
            "states": torch.randn(2, 5, 17),
            "actions": torch.randn(2, 5, 4),
            "returns_to_go": torch.randn(2, 5, 1),
            "timesteps": torch.arange(5).repeat(2, 1),
            "attention_mask": torch.ones(2, 5, dtype=torch.long),
        },
        {"hidden_size": 64, "max_ep_len": 40},
    ),
}
"""Type of a configuration -> its example inputs, and what it needs beyond :data:`TINY`."""

HEADS = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING")


def _transformers(kind: str) -> Network:
    import transformers
    from transformers.models.auto import modeling_auto

    make, extra = TRANSFORMERS[kind]
    config_class = transformers.CONFIG_MAPPING[kind]
    config = _tiny(config_class, extra)
    mappings = [getattr(modeling_auto, name) for name in HEADS] if make in (_text, _pair) else []
    mapping: Any = next((m for m in mappings if config_class in m), modeling_auto.MODEL_MAPPING)
    return mapping[config_class](config), make()


def transformers_networks() -> dict[str, Builder]:
    """The rows of :data:`TRANSFORMERS` that the installed version knows."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return {}
    return {k: partial(_transformers, k) for k in TRANSFORMERS if k in set(CONFIG_MAPPING)}


def networks() -> dict[str, Builder]:
    """All networks of the zoo, own ones first."""
    families = {
        "own": OWN,
        "torchvision": torchvision_networks(),
        "timm": timm_networks(),
        "transformers": transformers_networks(),
    }
    return {
        f"{family}/{n}": build for family, rows in families.items() for n, build in rows.items()
    }
