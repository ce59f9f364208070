# shellcheck shell=bash Real MySQL. Debian's stable releases have none, so it comes from unstable,
# unpacked with all its libraries, libc included, into a folder of the cache: nothing of it is
# installed. Which version that is, only unstable knows.

mysql_folder=$CACHE/mysql

mysql_program() { # sbin/mysqld or bin/mysql: sets `program`, the command that runs it with its own loader and libraries
  local lib
  lib=$mysql_folder/usr/lib/$(uname -m)-linux-gnu
  program=("$(printf '%s\n' "$mysql_folder"/usr/lib*/ld-linux-*.so.* | head -n 1)"
    --library-path "$lib:$mysql_folder/usr/lib/mysql/private" "$mysql_folder/usr/$1" --no-defaults)
}

mysql_fetch() { # mirror work-folder: unpacks the server and everything it needs into work-folder/root
  local mirror=$1 work=$2 deb
  mkdir -p "$work"/{root,state/lists/partial,cache/archives/partial}
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" >"$work/sources.list"
  # A state of its own leaves the machine's apt alone; an empty list of installed packages makes apt
  # fetch libc too.
  : >"$work/status"
  local apt=(apt-get -q -y -o Dir::State="$work/state" -o Dir::State::lists="$work/state/lists"
    -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null -o APT::Sandbox::User=root
    -o APT::Install-Recommends=false -o Debug::NoLocking=true -o Acquire::Retries=3 -o Acquire::Languages=none)
  "${apt[@]}" update && "${apt[@]}" --download-only install mysql-server-core mysql-client-core || return 1
  for deb in "$work"/cache/archives/*.deb; do dpkg -x "$deb" "$work/root" || return 1; done
}

apt_mirrors() { # those that apt already uses
  # shellcheck disable=SC2016 # apt's placeholder, not the shell's
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | sort -u
}

mysql_install() {
  [[ ! -d $mysql_folder ]] || return 0
  command -v apt-get >/dev/null || die "real MySQL needs Debian's apt-get here, or a Docker engine"
  log "fetching MySQL from Debian unstable (about 25 s)"
  local mirrors mirror attempt work=$CACHE/mysql.new log=$STATE/mysql/fetch.log
  # Without package lists apt names no mirror.
  mirrors=$(apt_mirrors) || { apt_update && mirrors=$(apt_mirrors); } || die "apt-get names no mirror to fetch MySQL from; as root run: apt-get update"
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
  die "MySQL cannot be had from Debian unstable; above is the end of $log"
}

mysql_start() {
  local data=$STATE/mysql/data options program
  mysql_program sbin/mysqld
  mapfile -t options < <(server_options mysql)
  options+=(--basedir="$mysql_folder/usr" --lc-messages-dir="$mysql_folder/usr/share/mysql"
    --character-sets-dir="$mysql_folder/usr/share/mysql/charsets" --plugin-dir="$mysql_folder/usr/lib/mysql/plugin"
    --secure-file-priv=NULL --mysqlx=OFF --innodb-redo-log-capacity=128M)
  if [[ ! -d $data ]]; then
    rm -rf "$data.new"
    # Without the init file: it is for the running server.
    "${program[@]}" "${options[@]/#--init-file=*/--initialize-insecure}" --datadir="$data.new" >"$STATE/mysql/init.log" 2>&1 </dev/null ||
      { cat "$STATE/mysql/init.log" >&2; die "mysqld --initialize-insecure failed"; }
    mv "$data.new" "$data"
  fi
  # MySQL believes the lock of a killed server for as long as anything has its number, the dead one
  # included.
  rm -f "$data/socket.lock"
  launch mysql "${program[@]}" "${options[@]}"
}

mysql_query() {
  local program
  mysql_program bin/mysql
  timeout 10 "${program[@]}" --host=127.0.0.1 --port="$(read_state mysql port)" --user=root --batch --skip-column-names -e "$1" 2>/dev/null
}

mysql_is_ready() { mysql_query 'select version()' >"$STATE/mysql/version"; }
