# Sourced by the other scripts: a virtual environment with the package, made where there is none.
# MIM_VENV names another place than .venv; PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv_dir="${MIM_VENV:-.venv}"

# setup EXTRA: install the package with an extra ("" for none), once for each set of requirements.
setup() {
  local extra="$1" target="." stamp digest
  [ -n "$extra" ] && target=".[$extra]"
  if [ ! -x "$venv_dir/bin/python" ]; then
    echo "making a virtual environment in $venv_dir" >&2
    "${PYTHON:-python3}" -m venv "$venv_dir"
  fi
  "$venv_dir/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "Python 3.10 or newer is needed; set PYTHON=python3.12, say" >&2
    exit 2
  }
  digest="$(cat pyproject.toml requirements*.txt | cksum | tr ' ' '-')-$PWD"
  stamp="$venv_dir/.mim-installed-${extra:-base}"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$digest" ]; then
    echo "installing $target" >&2
    "$venv_dir/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target"
    printf '%s' "$digest" > "$stamp"
  fi
  # Each process would otherwise compile torch and scikit-learn anew, which takes ten seconds.
  unset PYTHONDONTWRITEBYTECODE
  export PATH="$PWD/$venv_dir/bin:$PATH"
  [ "${venv_dir#/}" = "$venv_dir" ] || export PATH="$venv_dir/bin:$PATH"
}
