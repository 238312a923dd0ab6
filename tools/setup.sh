#!/usr/bin/env bash
# What `make` calls first; each failure is one sentence on stderr and exit status 1.
#   bash tools/setup.sh real,classroom  builds .venv with these extras at the tested versions, unless that is done already
#   bash tools/setup.sh flower          builds .venv-flower on top of it, for the test of minipeft/learn/flower.py
#   bash tools/setup.sh --port 8888     fails if something on this machine already listens on the port
# PYTHON=… names the interpreter; without it the first usable one of the list below is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "minipeft: $*" >&2
    exit 1
}

# "3.11" for an interpreter that runs, nothing for one that does not (a missing file, a pyenv shim without a version).
version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

new_enough() { # 3.11
    [ "${1%%.*}" -eq 3 ] && [ "${1#*.}" -ge 11 ]
}

# Sets $python to an interpreter that is new enough and can make virtual environments.
find_python() {
    local candidate found seen="" bare=""
    for candidate in ${PYTHON:+"$PYTHON"} $([ -n "${PYTHON:-}" ] || echo python3.13 python3.12 python3.11 python3); do
        found=$(version "$candidate")
        [ -n "$found" ] || continue
        if ! new_enough "$found"; then
            seen="$candidate is $found"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            bare=$candidate
        else
            python=$candidate
            return
        fi
    done
    [ -z "$bare" ] || fail "$bare cannot make virtual environments because its venv module is missing;" \
        "install it (on Debian and Ubuntu: sudo apt install python3-venv) and run the same command again."
    fail "Python 3.11 or newer is needed, but ${seen:-${PYTHON:-python3} does not run};" \
        "install one, or name one: make lab PYTHON=/path/to/python3.11"
}

check_port() {
    case $1 in
    "" | *[!0-9]* | ??????*) fail "PORT must be a number from 1 to 65535, but it is '$1'." ;;
    esac
    if [ "$1" -lt 1 ] || [ "$1" -gt 65535 ]; then fail "PORT must be a number from 1 to 65535, but it is $1."; fi
    if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then
        fail "port $1 is taken by another program (another JupyterLab?); choose another: make lab PORT=$(($1 + 2))"
    fi
}

# One line that changes whenever .venv has to be looked at again: the requirements, the interpreter, the folder (an
# editable install points at it).
fingerprint() {
    echo "$(cat pyproject.toml constraints.txt | cksum) $(version .venv/bin/python) $PWD"
}

up_to_date() { # real,test
    local extra
    [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$(fingerprint)" ] || return 1
    for extra in ${1//,/ }; do
        grep -qx "$extra" "$stamp" || return 1
    done
}

install() { # real,test
    local python="" have wanted log=.venv/pip.log said quiet=""
    have=$(version .venv/bin/python)
    wanted=$have
    if [ -n "${PYTHON:-}" ]; then
        find_python
        wanted=$(version "$python")
    fi
    if [ -z "$have" ] || [ "$have" != "$wanted" ] || ! new_enough "$have" || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        [ -n "$python" ] || find_python
        "$python" -m venv --clear .venv || fail "$python could not make the virtual environment .venv (see above)."
    fi
    ! up_to_date "$1" || return 0

    rm -f "$stamp" # an interrupted installation leaves none
    echo "Installing the course with its tested versions into .venv (the first time: some minutes, about 2 GB) …"
    [ -t 1 ] || quiet=--quiet
    # One call, so that nothing is resolved without the constraints.
    if ! .venv/bin/python -m pip install $quiet --disable-pip-version-check \
        -c constraints.txt -e ".[$1]" 2>"$log"; then
        said=$(grep -i '^ *error: ' "$log" | tail -n 1 | sed 's/^ *[Ee][Rr][Rr][Oo][Rr]: //; s/[. ]*$//' | cut -c -160)
        if grep -qiE 'no space left' "$log"; then
            fail "the disk is full; free about 3 GB and run the same command again."
        elif grep -qiE 'retrying|connection|timed out|temporary failure|http error|proxy' "$log"; then
            fail "a download failed (${said:-no answer}); check the network and run the same command again."
        fi
        fail "the installation failed (${said:-see $log}); all that pip said is in $log."
    fi
    # JupyterLab asks in a pop-up whether it may fetch news, unless it is told.
    mkdir -p .venv/share/jupyter/lab/settings
    echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' \
        >.venv/share/jupyter/lab/settings/overrides.json
    { fingerprint && tr , '\n' <<<"$1"; } >"$stamp"
}

# Flower's pins clash with the course's, so it has an environment of its own, which sees .venv's packages behind its own.
install_flower() {
    local wanted packages said log=.venv-flower/pip.log
    wanted="$flower $(version .venv/bin/python) $PWD"
    [ "$(cat .venv-flower/installed 2>/dev/null)" != "$wanted" ] || return 0
    packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null) ||
        fail "Flower is installed on top of .venv, which is not there; run make test."
    .venv/bin/python -m venv --clear .venv-flower || fail "the virtual environment .venv-flower could not be made (see above)."
    echo "Installing Flower into .venv-flower (the first time: a minute, about 300 MB) …"
    if ! .venv-flower/bin/python -m pip install --quiet --disable-pip-version-check "$flower" 2>"$log"; then
        said=$(grep -i '^ *error: ' "$log" | tail -n 1 | sed 's/^ *[Ee][Rr][Rr][Oo][Rr]: //; s/[. ]*$//' | cut -c -160)
        fail "Flower could not be installed (${said:-see $log}); check the network and run bash tools/setup.sh flower."
    fi
    .venv-flower/bin/python - "$packages" <<-'END'
	import sys, sysconfig
	from pathlib import Path
	line = f"import site; site.addsitedir({sys.argv[1]!r})\n"
	Path(sysconfig.get_path("purelib"), "course.pth").write_text(line)
	END
    echo "$wanted" >.venv-flower/installed
}

flower='flwr[simulation]==1.42.0'
stamp=.venv/installed
case ${1:-} in
--port) check_port "${2:-}" ;;
real | real,serve,beyond | real,classroom | real,book | real,test,classroom | real,test,classroom,book) install "$1" ;;
flower) install_flower ;;
*) fail "usage: bash tools/setup.sh real | real,serve,beyond | real,classroom | real,book | real,test,classroom | real,test,classroom,book | flower | --port NUMBER" ;;
esac
