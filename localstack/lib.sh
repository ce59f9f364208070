# shellcheck shell=bash What the scripts of this folder share: where things live, and how a part is
# started, found again and stopped. A part is `mariadb`, `mysql` or `sqs`; each has a file of its
# own that defines PART_install, PART_start and PART_is_ready. On Linux without a Docker engine the
# part is a process of ours, told apart from others by a variable in its environment; with an engine
# it is a container (compose.sh).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# Another folder holds another set of parts, with ports of their own: localstack/chaos has one that
# it may kill.
STATE=${PROJECTIONIST_STATE:-$ROOT/.local}
CACHE=${PROJECTIONIST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/projectionist}
# Debian keeps servers where only root's PATH looks.
PATH=$PATH:/usr/sbin:/sbin

log() { printf '%s\n' "$*" >&2; }
die() { log "error: $*"; exit 1; }

read_state() { # part thing: what was noted about a part: pid, port, version …
  cat "$STATE/$1/$2" 2>/dev/null
}

# --- ports ---

listeners() { # port: the socket inodes that make it unusable; LISTEN, or the near end of a live connection
  awk -v port="$(printf ':%04X' "$1")" 'substr($2, length($2) - 4) == port && $4 ~ /^(0A|01|02)$/ { print $10 }' \
    /proc/net/tcp /proc/net/tcp6 2>/dev/null
}

is_port_free() { # port
  if [[ -r /proc/net/tcp ]]; then [[ -z $(listeners "$1") ]]; else ! (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; fi
}

port_variable() { case $1 in sqs) echo LOCALSTACK_PORT ;; *) echo "${1^^}_PORT" ;; esac; }
default_port() {
  local offset=${PROJECTIONIST_PORT_OFFSET:-0}
  case $1 in mariadb) echo $((33061 + offset)) ;; mysql) echo $((33062 + offset)) ;; sqs) echo $((45660 + offset)) ;; esac
}

choose_port() { # part: records the port it gets: the one asked for, else the last one, else the first free one
  local variable port
  variable=$(port_variable "$1")
  if [[ -n ${!variable:-} ]]; then
    port=${!variable}
    is_port_free "$port" || die "$variable=$port is in use by something else"
  else
    port=$(read_state "$1" port) || port=$(default_port "$1")
    until is_port_free "$port"; do port=$((port + 10)); done
  fi
  echo "$port" >"$STATE/$1/port"
}

# --- processes ---

launch() { # part command…: in a session and an environment of its own, so that it outlives the shell and is the same in all
  local part=$1 dir=$STATE/$1
  shift
  [[ ! -e $dir/log ]] || mv "$dir/log" "$dir/log.previous"
  env -i PATH="$PATH" HOME="$HOME" LANG=C.UTF-8 PROJECTIONIST_PART="$dir" \
    setsid "$@" >"$dir/log" 2>&1 </dev/null 9>&- &
  echo $! >"$dir/pid"
  process_start_time $! >"$dir/born" || true
}

# When a process began, by the kernel's clock; nothing for one that has ended, reaped or not. Unlike
# its environment and its command line it is there from the first moment, and the same across exec.
process_start_time() { # pid
  local stat
  { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
  # The name before the last parenthesis may hold anything.
  read -ra stat <<<"${stat##*) }"
  [[ ${stat[0]} != [ZX] ]] && echo "${stat[19]}"
}

is_running() { # part: its process runs and is the one we launched; a number alone may have been given to another since
  local pid known
  pid=$(read_state "$1" pid) && known=$(read_state "$1" born) && [[ -n $pid && -n $known && $(process_start_time "$pid") == "$known" ]]
}

owns_port() { # part: it is our process that listens there, not a neighbour's that took the port first
  local inode
  for inode in $(listeners "$(read_state "$1" port)"); do
    [[ -z $(find "/proc/$(read_state "$1" pid)/fd" -lname "socket:\[$inode\]" 2>/dev/null) ]] || return 0
  done
  return 1
}

is_healthy() { is_running "$1" && owns_port "$1" && "${1}_is_ready"; }

wait_until_healthy() { # part
  local tries
  for ((tries = 0; tries < 600; tries++)); do
    if is_healthy "$1"; then return 0; fi
    is_running "$1" || break
    sleep 0.1
  done
  return 1
}

wait_until_stopped() { # part: waits until it has ended, 20 s at most
  local tries
  for ((tries = 0; tries < 200; tries++)); do
    is_running "$1" || return 0
    sleep 0.1
  done
  return 1
}

stop() { # part: asks, waits, insists; nothing where it does not run
  local pid
  if is_running "$1"; then
    pid=$(read_state "$1" pid)
    kill "$pid"
    wait_until_stopped "$1" || { kill -9 "$pid" && wait_until_stopped "$1"; } || die "$1, process $pid, cannot be stopped"
    log "$1 stopped"
  fi
  rm -f "$STATE/$1/pid" "$STATE/$1/born"
}

is_as_requested() { # part: it runs with the port and the services that this call names, if it names any
  local variable
  variable=$(port_variable "$1")
  [[ ${!variable:-$(read_state "$1" port)} == "$(read_state "$1" port)" ]] || return 1
  [[ $1 != sqs || ${LOCALSTACK_SERVICES:-$(read_state sqs services)} == "$(read_state sqs services)" ]]
}

bring_up() { # part: from whatever state it is in to healthy
  local part=$1 attempt
  if is_as_requested "$part" && is_healthy "$part"; then return 0; fi
  stop "$part"
  mkdir -p "$STATE/$part"
  "${part}_install"
  for attempt in 1 2 3; do
    choose_port "$part"
    "${part}_start"
    if wait_until_healthy "$part"; then return 0; fi
    stop "$part"
    # Somebody may take the port between our look at it and the server's: then, and only then, try
    # another.
    grep -qi 'address already in use' "$STATE/$part/log" || break
  done
  tail -n 40 "$STATE/$part/log" >&2
  die "$part did not become ready (attempt $attempt); above is the end of $STATE/$part/log"
}

# --- packages ---

as_root() { if [[ $EUID -eq 0 ]]; then "$@"; else sudo "$@"; fi; }

apt_update() { as_root apt-get update -qq >>"$STATE/apt.log" 2>&1 </dev/null; }

apt_install() { # package…
  command -v apt-get >/dev/null || die "without a Docker engine this needs Debian's apt-get, or $* installed some other way"
  [[ $EUID -eq 0 ]] || command -v sudo >/dev/null || die "missing: $*; as root run: apt-get install --no-install-recommends $*"
  local install=(as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@")
  log "installing $*"
  # The package lists may be missing or older than the mirror: only then are they worth fetching.
  "${install[@]}" >"$STATE/apt.log" 2>&1 </dev/null && return
  apt_update || true
  "${install[@]}" >>"$STATE/apt.log" 2>&1 </dev/null && return
  tail -n 20 "$STATE/apt.log" >&2
  die "apt-get could not install: $*"
}

need() { # command package: installs the package where the command is missing
  command -v "$1" >/dev/null || apt_install "$2"
}

# --- the project ---

target() { echo "${CARGO_TARGET_DIR:-$ROOT/target}"; }

need_cargo() {
  command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
  command -v cargo >/dev/null || die "this needs Rust: install it as https://rustup.rs says, then run this again"
}

load_env() {
  # shellcheck source=/dev/null
  source "$STATE/env"
}

# shellcheck source=mariadb.sh
source "$ROOT/localstack/mariadb.sh"
# shellcheck source=mysql.sh
source "$ROOT/localstack/mysql.sh"
# shellcheck source=sqs.sh
source "$ROOT/localstack/sqs.sh"
# shellcheck source=compose.sh
source "$ROOT/localstack/compose.sh"
