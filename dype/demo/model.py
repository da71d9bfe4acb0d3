"""Untrained parts of the demo pipeline: FLUX's classes and head layout at toy size."""

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dype.demo.scenes import ATTRIBUTES
from dype.pipelines.catalog import MODELS

LATENT_CHANNELS = 16
MAX_TOKENS = MODELS["demo"].max_sequence_length
TEXT_WIDTH = 128


def tokenizer(start: str | None) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer: `start` words <eos>, padded; unknown words are <unk>.

    Its vocabulary is every word of the captions, sorted.
    """
    attributes = {word for words in ATTRIBUTES.values() for word in words if word}
    grammar = {"a", "sun", "moon", "over", "mountains", "and", "at", "under", "sky", "with"}
    words = sorted(attributes | grammar)
    ids = {word: i for i, word in enumerate(["<pad>", "<unk>", "<bos>", *words, "<eos>"])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, ids[word]) for word in ("<bos>", "<eos>")]
    template = f"{start} $A <eos>" if start else "$A <eos>"
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )


def vae() -> AutoencoderKL:
    """Return an autoencoder of FLUX's class, factor 8, without attention.

    Attention trained at 512 px would meet sequences out of its range at 2048 px.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def transformer() -> FluxTransformer2DModel:
    """Return a transformer of FLUX's class and head layout: 128 dimensions, axes 16 / 56 / 56."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )


def text_encoders() -> dict:
    """Return text_encoder and tokenizer (CLIP), text_encoder_2 and tokenizer_2 (T5), by name."""
    clip, t5 = tokenizer("<bos>"), tokenizer(None)
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=clip.pad_token_id,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 4,
        d_ff=2 * TEXT_WIDTH,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=t5.pad_token_id,
        eos_token_id=t5.eos_token_id,
        dropout_rate=0.0,
    )
    return {
        "text_encoder": CLIPTextModel(clip_config),
        "tokenizer": clip,
        "text_encoder_2": T5EncoderModel(t5_config),
        "tokenizer_2": t5,
    }


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return FLUX's scheduler at the demo's scale: mu 1.15, 3.23, 11.55 at 512, 1024, 2048 px."""
    return FlowMatchEulerDiscreteScheduler(**MODELS["demo"].scheduler_config)
