# shellcheck shell=bash
# Real MySQL. Debian's stable releases do not have it, so it is fetched from unstable, in the
# version that is there. It is unpacked into a folder of the cache with all its libraries, including
# libc. Nothing is installed.

mysql_folder=$CACHE/mysql

# Sets `program` to the command that runs sbin/mysqld or bin/mysql with the loader and libraries of
# the package.
mysql_program() { # path
  local lib
  lib=$mysql_folder/usr/lib/$(uname -m)-linux-gnu
  program=("$(printf '%s\n' "$mysql_folder"/usr/lib*/ld-linux-*.so.* | head -n 1)"
    --library-path "$lib:$mysql_folder/usr/lib/mysql/private" "$mysql_folder/usr/$1" --no-defaults)
}

# Unpacks the server and its dependencies into work-folder/root.
mysql_fetch() { # mirror work-folder
  local mirror=$1 work=$2 deb
  mkdir -p "$work"/{root,state/lists/partial,cache/archives/partial}
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" \
    >"$work/sources.list"
  # apt gets a state of its own, so that the machine's is not changed. The empty list of installed
  # packages makes apt fetch libc, too.
  : >"$work/status"
  local apt=(apt-get -q -y -o Dir::State="$work/state" -o Dir::State::lists="$work/state/lists"
    -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache"
    -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
    -o APT::Sandbox::User=root -o APT::Install-Recommends=false -o Debug::NoLocking=true
    -o Acquire::Retries=3 -o Acquire::Languages=none)
  "${apt[@]}" update &&
    "${apt[@]}" --download-only install mysql-server-core mysql-client-core || return 1
  for deb in "$work"/cache/archives/*.deb; do dpkg -x "$deb" "$work/root" || return 1; done
}

apt_mirrors() { # prints the mirrors that apt is configured with
  # shellcheck disable=SC2016 # apt's placeholder, not the shell's
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | sort -u
}

mysql_install() {
  [[ ! -d $mysql_folder ]] || return 0
  command -v apt-get >/dev/null || die "real MySQL needs Debian's apt-get here, or a Docker engine"
  log "fetching MySQL from Debian unstable (about 25 s)"
  local mirrors mirror attempt work=$CACHE/mysql.new log=$STATE/mysql/fetch.log
  # Without package lists, apt prints no mirrors.
  mirrors=$(apt_mirrors) || { apt_update && mirrors=$(apt_mirrors); } ||
    die "apt-get knows no mirror to fetch MySQL from; as root run: apt-get update"
  : >"$log"
  for attempt in 1 2 3; do
    for mirror in $mirrors; do
      rm -rf "$work"
      if mysql_fetch "$mirror" "$work" >>"$log" 2>&1 </dev/null; then
        mv "$work/root" "$mysql_folder"
        rm -rf "$work"
        return
      fi
    done
    log "fetching MySQL failed, attempt $attempt of 3"
    [[ $attempt -eq 3 ]] || sleep $((attempt * 3))
  done
  tail -n 20 "$log" >&2
  die "MySQL could not be fetched from Debian unstable; above is the end of $log"
}

mysql_start() {
  local data=$STATE/mysql/data options program unsynced
  set_unsynced
  mysql_program sbin/mysqld
  program=("${unsynced[@]}" "${program[@]}")
  mapfile -t options < <(server_options mysql)
  options+=(--basedir="$mysql_folder/usr" --lc-messages-dir="$mysql_folder/usr/share/mysql"
    --character-sets-dir="$mysql_folder/usr/share/mysql/charsets"
    --plugin-dir="$mysql_folder/usr/lib/mysql/plugin"
    --secure-file-priv=NULL --mysqlx=OFF --innodb-redo-log-capacity=128M)
  if [[ ! -d $data ]]; then
    rm -rf "$data.new"
    # --initialize-insecure takes the place of the init file, which is for the running server.
    "${program[@]}" "${options[@]/#--init-file=*/--initialize-insecure}" --datadir="$data.new" \
      >"$STATE/mysql/init.log" 2>&1 </dev/null ||
      { cat "$STATE/mysql/init.log" >&2; die "mysqld --initialize-insecure failed"; }
    mv "$data.new" "$data"
  fi
  # MySQL respects the lock file of a killed server while any process has its process id, even if
  # that is the dead server itself.
  rm -f "$data/socket.lock"
  launch mysql "${program[@]}" "${options[@]}"
}

mysql_query() {
  local program
  mysql_program bin/mysql
  timeout 10 "${program[@]}" --host=127.0.0.1 --port="$(read_state mysql port)" --user=root \
    --batch --skip-column-names -e "$1" 2>/dev/null
}

mysql_is_ready() { mysql_query 'select version()' >"$STATE/mysql/version"; }
