"""Loads a trained model from its run folder."""

from __future__ import annotations

from pathlib import Path

from mim.model import MaskedImageModel, build_model
from mim.training import checkpoint


def load(path: str | Path, trust: bool = False) -> MaskedImageModel:
    """Loads the model of a run folder or of one of its checkpoints, in eval mode, on the CPU.

    Args:
        path: a run folder, or ``RUN/checkpoints/step_N.pt``.
        trust: whether plug-ins of a run folder from elsewhere may run.

    Raises:
        UserError: if there is no run or no checkpoint there.
    """
    path = Path(path)
    run = path if path.is_dir() else path.parent.parent
    model = build_model(checkpoint.read_config(run, trust))
    model.load_state_dict(checkpoint.model_state(path))
    return model.eval()
