#!/usr/bin/env bash
# Install the packages and set up the shell environment. `ray up` runs this on every machine, and again whenever
# the code or the cluster's YAML has changed.
set -euo pipefail

line='. ~/ray-ddpm/cluster/environment.sh'
grep -qxF "$line" ~/.bashrc 2>/dev/null || echo "$line" >> ~/.bashrc

if [ -n "${RAY_DDPM_VENV:-}" ]; then
    echo "using the packages in $RAY_DDPM_VENV"
    exit 0
fi
venv=$HOME/.ray-ddpm-venv
if [ ! -x "$venv/bin/pip" ]; then
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        # A machine that has just started may still be installing updates, hence the timeout for the lock.
        sudo apt-get -o DPkg::Lock::Timeout=300 update -q
        sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -qy python3-venv
    fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: python3 on this machine is older than Python 3.11" >&2
        exit 2
    }
    python3 -m venv "$venv"
fi
cd ~/ray-ddpm
"$venv/bin/pip" install --disable-pip-version-check -q -c constraints.txt -e '.[train,cluster]'
