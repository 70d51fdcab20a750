#!/usr/bin/env bash
# Run on every machine of a cluster by `ray up`, again after each change: the packages, and what shells read.
set -euo pipefail

line='. ~/ray-ddpm/cluster/environment.sh'
grep -qxF "$line" ~/.bashrc 2>/dev/null || echo "$line" >> ~/.bashrc

if [ -n "${RAY_DDPM_VENV:-}" ]; then
    echo "the packages are in $RAY_DDPM_VENV"
    exit 0
fi
venv=$HOME/.ray-ddpm-venv
if [ ! -x "$venv/bin/pip" ]; then
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        # A machine that has just started may still be updating itself.
        sudo apt-get -o DPkg::Lock::Timeout=300 update -q
        sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -qy python3-venv
    fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: python3 here is older than Python 3.11" >&2
        exit 2
    }
    python3 -m venv "$venv"
fi
cd ~/ray-ddpm
"$venv/bin/pip" install --disable-pip-version-check -q -c constraints.txt -e '.[train,cluster]'
