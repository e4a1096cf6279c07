# Sourced by the scripts beside it: goes to the repository's root and makes .venv there, with jaxlm and EXTRAS in it.
# Installs again only when pyproject.toml has changed. PYTHON names the interpreter to make it with (python3).

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Python keeps what it has compiled in .venv, whatever the shell says: a start of jaxlm takes two seconds less.
unset PYTHONDONTWRITEBYTECODE
if [ ! -x .venv/bin/python ]; then
    python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "jaxlm needs Python 3.11 or newer; $python is $("$python" --version 2>/dev/null || echo missing). Set PYTHON to one." >&2
        exit 2
    fi
    "$python" -m venv .venv
fi
stamp=".venv/installed$EXTRAS"
if ! cmp -s pyproject.toml "$stamp"; then
    echo "installing jaxlm$EXTRAS into .venv ..." >&2
    pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
    # uv takes a tenth of pip's time, but reads no pip.conf, where a mirror may be named.
    if ! { "${pip[@]}" uv && .venv/bin/uv pip install --quiet --python .venv/bin/python --editable ".$EXTRAS"; } 2>/dev/null; then
        "${pip[@]}" --editable ".$EXTRAS"
    fi
    cp pyproject.toml .venv/installed  # any extras include the rest
    cp pyproject.toml "$stamp"
fi
