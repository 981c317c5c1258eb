#!/usr/bin/env bash
# A few tests under the oldest versions that requirements.txt allows, in an environment of their own.
# It lies over that of the tests, from which it takes torch, torchvision and what has no wheel of that
# age for this Python; MIM_CI_OLDEST=1 lowers torch too, which is a download of gigabytes.
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
setup dev
oldest="$(mktemp -d)"
trap 'rm -rf "$oldest"' EXIT
lower='timm|einops|accelerate|pyyaml|numpy|pillow|scipy|scikit-learn|scikit-image|matplotlib|rich'
lower+='|safetensors|filelock|jinja2|torchmetrics|packaging'
[ -z "${MIM_CI_OLDEST:-}" ] || lower+='|torch|torchvision'
sed -nE "s/^($lower)>=/\\1==/p" requirements.txt > "$oldest/oldest.txt"
python -m venv "$oldest/venv"
"$oldest/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --requirement "$oldest/oldest.txt"
python -c 'import site; print(site.getsitepackages()[0])' > "$(
  "$oldest/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/newer.pth"
"$oldest/venv/bin/pip" list --disable-pip-version-check --path "$oldest"/venv/lib/*/site-packages
PYTHONPATH="$PWD" "$oldest/venv/bin/python" -m pytest -n 0 -p no:cacheprovider \
  tests/model/test_families.py tests/training/test_optim.py tests/evaluate/test_features.py \
  tests/interop/test_grids.py tests/masks/test_patch_mask.py "$@"
