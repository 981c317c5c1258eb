"""What predicts the hidden patches from the latents: one file a kind; begin with ``base.py``."""

from mim.model.decoders.base import (
    DECODERS,
    BlocksSettings,
    Decoder,
    DecoderContext,
    build_decoder,
)
from mim.model.decoders.block_predictor import BlockPredictor, BlockPredictorSettings
from mim.model.decoders.convolutional import ConvolutionalDecoder, ConvolutionalSettings
from mim.model.decoders.cross_attention import (
    CrossAttentionDecoder,
    CrossAttentionSettings,
    CrossBlock,
)
from mim.model.decoders.heads import LinearDecoder, MlpDecoder, MlpSettings
from mim.model.decoders.rotary import RotaryDecoder, RotarySettings
from mim.model.decoders.transformer import TransformerDecoder, TransformerSettings

__all__ = [
    "DECODERS",
    "BlockPredictor",
    "BlockPredictorSettings",
    "BlocksSettings",
    "ConvolutionalDecoder",
    "ConvolutionalSettings",
    "CrossAttentionDecoder",
    "CrossAttentionSettings",
    "CrossBlock",
    "Decoder",
    "DecoderContext",
    "LinearDecoder",
    "MlpDecoder",
    "MlpSettings",
    "RotaryDecoder",
    "RotarySettings",
    "TransformerDecoder",
    "TransformerSettings",
    "build_decoder",
]
