# shellcheck shell=bash
# Installs Python packages from PyPI, with pinned versions and hashes.

python_311() { # prints a Python 3.11: this LocalStack does not load with other versions
  local candidate
  for candidate in python3.11 /usr/bin/python3.11 python3; do
    # Run the candidate, because version managers have shims for versions that are not installed.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo 3.11 # uv may find or download one
}

# Prints the folder for the packages of a list. Its name depends on the list, so that an upgrade
# never runs with the packages of before.
venv_of() { # name list
  echo "$CACHE/$1-$(cksum <"$2" | cut -d' ' -f1)"
}

install_venv() { # name list seconds: installs the packages of a list, unless they are there
  local name=$1 list=$2 venv log=$STATE/$1-install.log uv
  venv=$(venv_of "$name" "$list")
  [[ ! -e $venv/complete ]] || return 0
  mkdir -p "$STATE"
  # uv brings CA certificates of its own, which do not include that of a company's proxy.
  [[ ! -e /etc/ssl/certs/ca-certificates.crt ]] || export UV_SYSTEM_CERTS=1
  log "installing $name ($3)"
  if ! uv=$(command -v uv); then
    uv=$CACHE/uv/bin/uv
    need python3 python3
    # Debian's python3 does not include ensurepip, which venv needs.
    python3 -c 'import ensurepip' 2>/dev/null || apt_install python3-venv
    [[ -x $uv ]] ||
      { python3 -m venv --clear "$CACHE/uv" && "$CACHE/uv/bin/pip" install -q uv; } >"$log" 2>&1 ||
      install_failed "$log" "uv could not be installed from PyPI"
  fi
  rm -rf "$venv"
  "$uv" venv -q --no-config --python "$(python_311)" "$venv" >>"$log" 2>&1 ||
    install_failed "$log" "$name needs Python 3.11: install python3.11, or start a Docker engine"
  # A cache would store every package a second time.
  "$uv" pip install -q --no-cache --require-hashes --python "$venv/bin/python" -r "$list" \
    >>"$log" 2>&1 || install_failed "$log" "$name could not be installed from PyPI"
  touch "$venv/complete"
}

install_failed() { # log message…
  local log=$1
  shift
  tail -n 20 "$log" >&2
  die "$*; above is the end of $log"
}
