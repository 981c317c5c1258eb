"""From a run folder to files that others load without this package, each with a model card."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim.core.config import Config
from mim.core.errors import UserError, choice_error, setting_error
from mim.core.public import public
from mim.evaluate.encoders import normalisation
from mim.interop.card import card_text, library_line, public_config
from mim.interop.layouts import to_hf, to_mae, to_timm
from mim.model.backbones import (
    build_backbone,
    family_of,
    grid_of,
    load_backbone,
    patch_size_of,
    supports_split,
)
from mim.training import checkpoint
from mim.training.loading import load

PARTS = ("encoder", "model")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    """The file or folder."""
    card: Path
    """The model card."""
    usage: str
    """Python that loads it."""


@dataclass(frozen=True)
class _Job:
    run: Path
    config: Config
    output: Path
    part: str | None

    def state(self) -> dict[str, Tensor]:
        """The whole model's weights, or the encoder's where there is no checkpoint."""
        if checkpoint.checkpoints(self.run):
            return load(self.run).state_dict()
        return self.encoder()

    def mae_state(self) -> dict[str, Tensor]:
        """Encoder and decoder, without what only chose masks or targets in training."""
        state = self.state()
        return {k: v for k, v in state.items() if k.startswith(("backbone.", "decoder."))}

    def encoder(self) -> dict[str, Tensor]:
        weights = checkpoint.encoder_weights(self.run)
        return {f"backbone.{key}": value for key, value in weights.items()}

    def vit(self) -> nn.Module:
        config = self.config
        vit = build_backbone(config.model, config.data.size, config.data.channels, config.seed)
        load_backbone(vit, checkpoint.encoder_weights(self.run), f"run {self.run}")
        return vit.eval()

    def plain_vit(self, to: str) -> VisionTransformer:
        """The encoder, which must be of the only kind that other layouts hold.

        Raises:
            UserError: if it is not.
        """
        vit = self.vit()
        if not isinstance(vit, VisionTransformer):
            reason = f"holds plain ViTs, and this encoder is a {type(vit).__name__}; use timm"
            raise setting_error("--to", to, reason)
        return vit

    def metadata(self) -> dict[str, str]:
        """What a safetensors file says of itself, which is all that ``mim import`` needs."""
        config = json.dumps(public_config(self.config))
        return {"backbone": self.config.model.backbone, "mim_config": config}

    def includes_decoder(self) -> bool:
        """Whether the decoder goes with the encoder; by default, where it is one of MAE's.

        Raises:
            UserError: if the decoder was asked for and is not one of MAE's.
        """
        model = self.config.model
        imported = checkpoint.read_result(self.run).get("imported", {})
        is_mae = (
            model.regime.name == "drop"
            and model.decoder.name == "transformer"
            and model.target.name in ("pixels", "normalized_pixels")
            and model.target.loss in ("auto", "mse")  # auto is mse for pixels
            and model.target.loss_on == "masked"
            and bool(checkpoint.checkpoints(self.run))
            and bool(imported.get("decoder", True))
        )
        if self.part == "model" and not is_mae:
            reason = (
                "needs model.regime.name=drop, model.decoder.name=transformer, "
                "model.target.loss=mse, loss_on=masked, a target of pixels and a trained decoder; "
                f"this run has {model.regime.name}, {model.decoder.name}, {model.target.loss}, "
                f"{model.target.loss_on}, {model.target.name}; use --part encoder"
            )
            raise setting_error("--part", "model", reason)
        return is_mae and self.part != "encoder"


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


# --- timm, safetensors, facebookresearch/mae ---


def _timm(job: _Job) -> str:
    if job.part == "model":
        raise setting_error(
            "--part", "model", "has no place in timm's layout; use --to safetensors"
        )
    if job.output.suffix != ".safetensors":
        return _timm_folder(job)
    checkpoint.save_encoder(job.output, _plain(to_timm(job.encoder())), job.metadata())
    return _timm_usage(job)


def _timm_usage(job: _Job) -> str:
    model, data = job.config.model, job.config.data
    extra = {**public(model.backbone_args), "img_size": data.image_size, "in_chans": data.channels}
    arguments = ", ".join(f"{key}={value!r}" for key, value in extra.items())
    imports = "import timm\n\n"
    if model.norm_eps is not None:
        imports = (
            "from functools import partial\n\nimport timm\nfrom timm.layers import LayerNorm\n\n"
        )
        arguments += f", norm_layer=partial(LayerNorm, eps={model.norm_eps!r})"
    return (
        f"{imports}timm.create_model({model.backbone!r}, "
        f"checkpoint_path={str(job.output)!r}, num_classes=0, {arguments})"
    )


def _timm_folder(job: _Job) -> str:
    """What a repository of the hub holds: weights, and a config with size, statistics and pooling.

    The pooling is the mean of the patch tokens, as in every evaluation.
    """
    model, data, vit = job.config.model, job.config.data, job.vit()
    if model.norm_eps is not None:
        reason = "has no place in timm's config.json; export a file, and see its card"
        raise setting_error("model.norm_eps", model.norm_eps, reason)
    args = {"img_size": list(data.size), "in_chans": data.channels, **model.backbone_args}
    if isinstance(vit, VisionTransformer) and "global_pool" not in args:
        args |= {"global_pool": "avg", "fc_norm": False}
    mean, std = normalisation(job.config.data)
    described = {
        "architecture": model.backbone,
        "num_classes": 0,
        "num_features": family_of(vit).width,
        "global_pool": args.get("global_pool", "avg"),
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [data.channels, *data.size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        },
    }
    checkpoint.prepare_folder(job.output, "--output")
    weights = _plain(to_timm(job.encoder()))
    checkpoint.save_encoder(job.output / "model.safetensors", weights, job.metadata())
    checkpoint.write_json_atomic(job.output / "config.json", described)
    return (
        f"import timm\n\nmodel = timm.create_model('local-dir:' + {str(job.output)!r}, "
        "pretrained=True)  # or 'hf-hub:USER/NAME'\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    )


def _safetensors(job: _Job) -> str:
    state = job.state() if job.part == "model" else to_timm(job.encoder())
    checkpoint.save_encoder(job.output, _plain(state), job.metadata())
    return (
        "from safetensors.torch import load_file\n\n"
        f"state = load_file({str(job.output)!r})  # mim import takes it too"
    )


def _mae(job: _Job) -> str:
    job.plain_vit("mae")
    state = _plain(to_mae(job.mae_state() if job.includes_decoder() else job.encoder()))
    content: dict[str, Any] = {"model": state}
    height, width = job.config.data.size
    if height != width:  # which readers of this layout cannot see
        content["args"] = {"input_size": [height, width]}
    checkpoint.write_atomic(job.output, lambda temporary: torch.save(content, temporary))
    return (
        "import torch\n\n"
        f"state = torch.load({str(job.output)!r}, weights_only=True)['model']  "
        "# facebookresearch/mae's keys"
    )


# --- Hugging Face ---


def _check_hf(vit: VisionTransformer) -> None:
    """Raise UserError for the first thing that Hugging Face's ViT computes otherwise."""
    patch, grid = patch_size_of(vit), grid_of(vit)
    blocks: list[Any] = list(vit.blocks)
    reasons = [
        (not supports_split(vit), "blocks of another kind"),
        (not vit.has_class_token or vit.num_prefix_tokens != 1, "other tokens than a class token"),
        (vit.pos_embed is None or vit.no_embed_class, "no position for its class token"),
        (isinstance(vit.norm, nn.Identity), "no norm after its last block"),
        (patch[0] != patch[1] or grid[0] != grid[1], "patches or a grid that are not square"),
        (vit.patch_embed.proj.bias is None, "a patch embedding without bias"),
        (not all(_is_gelu(block.mlp.act) for block in blocks), "another activation than gelu"),
        (len({norm.eps for norm in _norms(vit)}) != 1, "norms of different epsilons"),
        (any(block.attn.qkv.bias is None for block in blocks), "queries without bias"),
    ]
    found = [reason for holds, reason in reasons if holds]
    if found:
        raise setting_error(
            "--to", "hf", f"cannot hold this encoder: Hugging Face's ViT has not {found[0]}"
        )


def _norms(vit: VisionTransformer) -> list[nn.LayerNorm]:
    return [part for part in vit.modules() if isinstance(part, nn.LayerNorm)]


def _is_gelu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.GELU) and activation.approximate == "none"


def _hf(job: _Job) -> str:
    vit, config = job.plain_vit("hf"), job.config
    _check_hf(vit)
    has_decoder = job.includes_decoder()
    kind = "ViTMAEForPreTraining" if has_decoder else "ViTModel"
    block: Any = vit.blocks[0]
    described: dict[str, Any] = {
        "architectures": [kind],
        "model_type": "vit_mae" if has_decoder else "vit",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": _norms(vit)[0].eps,
        "image_size": config.data.size[0],
        "patch_size": patch_size_of(vit)[0],
        "num_channels": config.data.channels,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if has_decoder:
        decoder = config.model.decoder.transformer
        described |= {
            "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": int(decoder.width * decoder.mlp_ratio),
            "mask_ratio": sum(config.mask.ratio_range) / 2,
            "norm_pix_loss": config.model.target.name == "normalized_pixels",
        }
    state = to_hf(job.mae_state() if has_decoder else job.encoder(), model=has_decoder)
    mean, std = normalisation(config.data)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.data.size[0], "width": config.data.size[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    checkpoint.prepare_folder(job.output, "--output")
    checkpoint.save_encoder(job.output / "model.safetensors", _plain(state), {})
    checkpoint.write_json_atomic(job.output / "config.json", described)
    checkpoint.write_json_atomic(job.output / "preprocessor_config.json", processor)
    plain = f"ViTModel.from_pretrained({str(job.output)!r}, add_pooling_layer=False)"
    if not has_decoder:
        return f"from transformers import ViTModel\n\n{plain}"
    return (
        f"from transformers import {kind}, ViTModel\n\n"
        f"{plain}  # the encoder on whole images: features\n"
        f"# {kind}'s own forward hides {described['mask_ratio']:.0%} of the patches, drawn anew at "
        f"each call:\n{kind}.from_pretrained({str(job.output)!r})"
    )


def _with_normalisation(config: Config) -> Config:
    """The config with the source's own statistics filled in, where its images are still there."""
    try:
        mean, std = normalisation(config.data)
    except UserError:
        return config
    return replace(config, data=replace(config.data, mean=mean, std=std))


# --- ONNX ---


class _Features(nn.Module):
    """Normalised images to tokens and their mean over patches."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        family = family_of(self.vit)
        tokens = family.features(images)  # (B, P + N, D)
        return tokens, tokens[:, family.num_prefix :].mean(dim=1)


def _onnx(job: _Job) -> str:
    if job.part == "model":
        raise setting_error("--part", "model", "is not exported to onnx; the encoder is")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--to onnx: the extra onnx is not installed: pip install -e '.[onnx]'"
        ) from error
    module = _Features(job.vit()).eval()
    height, width = job.config.data.size
    example = torch.zeros(2, job.config.data.channels, height, width)
    batch = torch.export.Dim("batch", min=1)

    def write(temporary: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                (example,),
                temporary,
                input_names=["images"],
                output_names=["tokens", "features"],
                dynamic_shapes={"images": {0: batch}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )

    checkpoint.write_atomic(job.output, write)
    return (
        "import onnxruntime\n\n"
        f"session = onnxruntime.InferenceSession({str(job.output)!r})\n"
        'tokens, features = session.run(None, {"images": images})  # float32, normalised'
    )


@dataclass(frozen=True)
class _Format:
    suffix: str
    write: Callable[[_Job], str]


FORMATS = {
    "timm": _Format(".safetensors", _timm),
    "hf": _Format("", _hf),
    "safetensors": _Format(".safetensors", _safetensors),
    "onnx": _Format(".onnx", _onnx),
    "mae": _Format(".pth", _mae),
}
"""``--to`` -> how the name of the output ends (nothing: a folder) and what writes it."""


def _card_path(output: Path, is_folder: bool, to: str) -> Path:
    """Where the card goes; that of another export stays.

    Raises:
        UserError: for a folder that holds another export.
    """
    if not is_folder:
        card = output.with_suffix(".md")
        taken = card.is_file() and repr(output.name) not in card.read_text(encoding="utf-8")
        return output.with_name(f"{output.name}.md") if taken else card
    card = output / "README.md"
    if card.is_file() and library_line(to) not in card.read_text(encoding="utf-8"):
        raise setting_error("--output", str(output), "holds another export; choose another folder")
    return card


def export_run(run: str | Path, to: str, output: str | Path, part: str | None = None) -> Exported:
    """Write a run's weights in a layout that others load, and a model card beside.

    Args:
        run: the run folder.
        to: ``timm`` (a file for ``timm.create_model(..., checkpoint_path=...)``, or a folder
            without a suffix, ready to push to a hub), ``hf`` (a folder
            for ``from_pretrained``), ``safetensors``, ``onnx``, or ``mae`` (facebookresearch/mae's
            keys in a torch file).
        output: the file, or for ``hf`` the folder.
        part: ``encoder`` or ``model`` (with regime and decoder). By default the encoder; for
            ``hf`` and ``mae`` the model, where it is one that MAE's code computes too.

    Raises:
        UserError: for an unknown format or part, a run that is not there, an output that cannot be
            written, or a model the format cannot hold without changing its outputs.
    """
    if to not in FORMATS:
        raise choice_error("--to", to, FORMATS)
    if part is not None and part not in PARTS:
        raise choice_error("--part", part, PARTS)
    kind, run, output = FORMATS[to], Path(run), Path(output)
    is_folder = not kind.suffix or (to == "timm" and not output.suffix)
    if not is_folder and output.suffix != kind.suffix:
        raise UserError(f"--output: {str(output)!r} must end in {kind.suffix}")
    if is_folder and output.suffix in (".safetensors", ".pth", ".onnx", ".pt", ".bin"):
        raise UserError(f"--output: {str(output)!r} must be a folder for --to {to}")
    config = _with_normalisation(checkpoint.read_config(run))
    checkpoint.prepare_folder(output.parent, "--output")
    if is_folder and (output / "config.yaml").is_file():
        raise setting_error("--output", str(output), "holds a run; choose another folder")
    card = _card_path(output, is_folder, to)
    usage = kind.write(_Job(run, config, output, part))
    # Readers of the card have the file, not this machine's folders.
    relative = usage.replace(repr(str(output)), repr("." if is_folder else output.name))
    checkpoint.write_text_atomic(card, card_text(run, config, relative, to))
    return Exported(output, card, usage)
