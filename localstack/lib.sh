# shellcheck shell=bash
# Functions that the scripts of this folder share. They start, find and stop the parts: the services
# `mariadb`, `mysql` and `sqs`. Each part has a file of its own that defines PART_install,
# PART_start and PART_is_ready. On Linux without a Docker engine, a part is a process with a
# variable in its environment that identifies it. With an engine, a part is a container
# (compose.sh).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# Another state folder holds another set of parts with other ports: localstack/chaos has one whose
# parts it kills.
STATE=${PROJECTIONIST_STATE:-$ROOT/.local}
CACHE=${PROJECTIONIST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/projectionist}
# On Debian, servers are in folders that are only in root's PATH.
PATH=$PATH:/usr/sbin:/sbin

log() { printf '%s\n' "$*" >&2; }
die() { log "error: $*"; exit 1; }

read_state() { # part name: prints a recorded value of a part: pid, port, version …
  cat "$STATE/$1/$2" 2>/dev/null
}

# --- ports ---

# Prints the inodes of the sockets that occupy a port: a listener, or the local end of a connection.
listeners() { # port
  awk -v port="$(printf ':%04X' "$1")" \
    'substr($2, length($2) - 4) == port && $4 ~ /^(0A|01|02)$/ { print $10 }' \
    /proc/net/tcp /proc/net/tcp6 2>/dev/null
}

is_port_free() { # port
  if [[ -r /proc/net/tcp ]]; then
    [[ -z $(listeners "$1") ]]
  else
    ! (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null
  fi
}

port_variable() { case $1 in sqs) echo LOCALSTACK_PORT ;; *) echo "${1^^}_PORT" ;; esac; }
default_port() {
  local offset=${PROJECTIONIST_PORT_OFFSET:-0}
  case $1 in
    mariadb) echo $((33061 + offset)) ;;
    mysql) echo $((33062 + offset)) ;;
    sqs) echo $((45660 + offset)) ;;
  esac
}

# Records the port of a part: the requested one, else the last one, else the first free one.
choose_port() { # part
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

# Starts a part in a session and an environment of its own, so that it outlives the shell and is the
# same from every shell.
launch() { # part command…
  local part=$1 dir=$STATE/$1
  shift
  [[ ! -e $dir/log ]] || mv "$dir/log" "$dir/log.previous"
  env -i PATH="$PATH" HOME="$HOME" LANG=C.UTF-8 PROJECTIONIST_PART="$dir" \
    setsid "$@" >"$dir/log" 2>&1 </dev/null 9>&- &
  echo $! >"$dir/pid"
  process_start_time $! >"$dir/born" || true
}

# Prints when a process began, by the kernel's clock. Fails for a process that has ended, even if it
# has not been reaped. Unlike environment and command line, this time exists from the first moment
# and does not change at exec.
process_start_time() { # pid
  local stat
  { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
  # The process name before the last parenthesis can contain any character.
  read -ra stat <<<"${stat##*) }"
  [[ ${stat[0]} != [ZX] ]] && echo "${stat[19]}"
}

# Whether the process of a part runs and is the one that was launched. The process id alone does not
# show this, because another process can have it by now.
is_running() { # part
  local pid known
  pid=$(read_state "$1" pid) && known=$(read_state "$1" born) &&
    [[ -n $pid && -n $known && $(process_start_time "$pid") == "$known" ]]
}

# Whether the process of a part listens on its port. Another process may have taken the port first.
owns_port() { # part
  local inode descriptors
  descriptors=/proc/$(read_state "$1" pid)/fd
  for inode in $(listeners "$(read_state "$1" port)"); do
    [[ -z $(find "$descriptors" -lname "socket:\[$inode\]" 2>/dev/null) ]] || return 0
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

wait_until_stopped() { # part: waits for at most 20 s
  local tries
  for ((tries = 0; tries < 200; tries++)); do
    is_running "$1" || return 0
    sleep 0.1
  done
  return 1
}

stop() { # part: sends SIGTERM, waits, and then sends SIGKILL
  local pid
  if is_running "$1"; then
    pid=$(read_state "$1" pid)
    kill "$pid"
    wait_until_stopped "$1" || { kill -9 "$pid" && wait_until_stopped "$1"; } ||
      die "$1, process $pid, cannot be stopped"
    log "$1 stopped"
  fi
  rm -f "$STATE/$1/pid" "$STATE/$1/born"
}

# Whether a part was started with the port and the services that the environment now requests.
is_as_requested() { # part
  local variable
  variable=$(port_variable "$1")
  [[ ${!variable:-$(read_state "$1" port)} == "$(read_state "$1" port)" ]] || return 1
  [[ $1 != sqs ]] ||
    [[ ${LOCALSTACK_SERVICES:-$(read_state sqs services)} == "$(read_state sqs services)" ]]
}

bring_up() { # part: makes it healthy, whatever state it is in
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
    # Another process may take the port after it was chosen. Only then is another port tried.
    grep -qi 'address already in use' "$STATE/$part/log" || break
  done
  tail -n 40 "$STATE/$part/log" >&2
  die "$part did not become ready (attempt $attempt); above is the end of $STATE/$part/log"
}

# --- packages ---

as_root() { if [[ $EUID -eq 0 ]]; then "$@"; else sudo "$@"; fi; }

apt_update() { as_root apt-get update -qq >>"$STATE/apt.log" 2>&1 </dev/null; }

apt_install() { # package…
  command -v apt-get >/dev/null ||
    die "without a Docker engine this needs Debian's apt-get, or $* installed some other way"
  [[ $EUID -eq 0 ]] || command -v sudo >/dev/null ||
    die "missing: $*; as root run: apt-get install --no-install-recommends $*"
  local install=(as_root env DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "$@")
  log "installing $*"
  # Package lists are fetched only if the installation fails, because they may be missing or
  # outdated.
  "${install[@]}" >"$STATE/apt.log" 2>&1 </dev/null && return
  apt_update || true
  "${install[@]}" >>"$STATE/apt.log" 2>&1 </dev/null && return
  tail -n 20 "$STATE/apt.log" >&2
  die "apt-get could not install: $*"
}

need() { # command package: installs the package if the command is missing
  command -v "$1" >/dev/null || apt_install "$2"
}

# Sets `unsynced` to a prefix for a command whose fsync shall return at once. The suite creates and
# drops thousands of tables, and for each of them a server waits for the disk several times. The
# data survives a kill of the server, but not a crash of the machine. If the library cannot be
# downloaded, the prefix is empty, and the suite takes longer.
set_unsynced() {
  local folder=$CACHE/eatmydata work=$CACHE/eatmydata.new library
  library=$folder/usr/lib/$(uname -m)-linux-gnu/libeatmydata.so
  unsynced=()
  if [[ ! -e $library ]]; then
    rm -rf "$work" "$folder"
    mkdir -p "$work"
    (cd "$work" && fetch_unsynced) >"$work/log" 2>&1 </dev/null ||
      { log "without libeatmydata1, the databases are slow: $(tail -n 1 "$work/log")"; return 0; }
    mv "$work/root" "$folder"
    rm -rf "$work"
  fi
  unsynced=(env LD_PRELOAD="$library")
}

fetch_unsynced() { # unpacks the library into the folder root
  # As root, apt-get would download as a user who may not write here.
  local download=(apt-get -q -o APT::Sandbox::User="$(id -un)" download libeatmydata1)
  { "${download[@]}" || { apt_update && "${download[@]}"; }; } && dpkg -x libeatmydata1_*.deb root
}

# --- the project ---

target() { echo "${CARGO_TARGET_DIR:-$ROOT/target}"; }

need_cargo() {
  command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
  command -v cargo >/dev/null ||
    die "this needs Rust: install it as https://rustup.rs says, then run this again"
}

load_env() {
  # shellcheck source=/dev/null
  source "$STATE/env"
}

# shellcheck source=mariadb.sh
source "$ROOT/localstack/mariadb.sh"
# shellcheck source=mysql.sh
source "$ROOT/localstack/mysql.sh"
# shellcheck source=python.sh
source "$ROOT/localstack/python.sh"
# shellcheck source=sqs.sh
source "$ROOT/localstack/sqs.sh"
# shellcheck source=ministack.sh
source "$ROOT/localstack/ministack.sh"
# shellcheck source=compose.sh
source "$ROOT/localstack/compose.sh"
