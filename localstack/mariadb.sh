# shellcheck shell=bash
# MariaDB from the distribution, as a private instance. Debian's -core packages start no service.

# Prints the options of both servers. The isolation level and the lock waits keep the server's
# defaults, because the tests depend on them. Without name resolution, a TCP client matches '%' and
# never 'localhost', where MariaDB has an anonymous user that would take precedence. The socket is
# relative to the data directory, because an absolute path may be too long for a socket.
server_options() { # part
  printf '%s\n' --datadir="$STATE/$1/data" --socket=socket --bind-address=127.0.0.1 \
    --port="$(read_state "$1" port)" --user="$(id -un)" \
    --init-file="$ROOT/localstack/init.sql" --skip-name-resolve --skip-log-bin \
    --character-set-server=utf8mb4 --max-connections=500 --max-allowed-packet=64M \
    --innodb-buffer-pool-size=256M --innodb-flush-log-at-trx-commit=2 \
    --innodb-flush-method=nosync
}

mariadb_install() {
  need mariadbd mariadb-server-core
  need mariadb mariadb-client-core
}

mariadb_start() {
  local data=$STATE/mariadb/data options unsynced
  set_unsynced
  if [[ ! -d $data ]]; then
    # Created under another name and then moved, so that an interrupted start does not leave an
    # incomplete data directory.
    rm -rf "$data.new"
    "${unsynced[@]}" mariadb-install-db --no-defaults --user="$(id -un)" --datadir="$data.new" \
      --auth-root-authentication-method=normal --skip-test-db >"$STATE/mariadb/init.log" 2>&1 ||
      { cat "$STATE/mariadb/init.log" >&2; die "mariadb-install-db failed"; }
    mv "$data.new" "$data"
  fi
  mapfile -t options < <(server_options mariadb)
  launch mariadb "${unsynced[@]}" mariadbd --no-defaults "${options[@]}" --innodb-log-file-size=128M
}

mariadb_query() {
  # A server that hangs accepts connections but does not answer.
  timeout 10 mariadb --no-defaults --host=127.0.0.1 --port="$(read_state mariadb port)" \
    --user=root --batch --skip-column-names -e "$1" 2>/dev/null
}

mariadb_is_ready() { mariadb_query 'select version()' >"$STATE/mariadb/version"; }
