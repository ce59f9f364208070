# shellcheck shell=bash The parts as containers of a Compose project of this folder of parts. See
# compose.yaml for what was never run.

compose() {
  # Every port is named in the file, also those of parts that were not asked for.
  env MARIADB_PORT="$(read_state mariadb port || default_port mariadb)" \
    MYSQL_PORT="$(read_state mysql port || default_port mysql)" \
    LOCALSTACK_PORT="$(read_state sqs port || default_port sqs)" \
    LOCALSTACK_SERVICES="${LOCALSTACK_SERVICES:-$(read_state sqs services || echo "$sqs_services")}" \
    docker compose --project-name "projectionist-$(cksum <<<"$STATE" | cut -d' ' -f1)" --file "$ROOT/localstack/compose.yaml" "$@"
}

# Once chosen it is kept until `down`: a part must be found again by the way it was started.
uses_compose() {
  [[ ! -e $STATE/compose ]] || return 0
  ! is_running mariadb && ! is_running mysql && ! is_running sqs && [[ ${PROJECTIONIST_PARTS:-} != host ]] &&
    docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1
}

runs_in_compose() { [[ -n $(compose ps --status running --quiet "$1" 2>/dev/null) ]]; }

compose_up() { # part…
  local part
  touch "$STATE/compose"
  for part; do
    mkdir -p "$STATE/$part"
    if ! is_as_requested "$part" || ! runs_in_compose "$part"; then choose_port "$part"; fi
    [[ $part != sqs ]] || echo "${LOCALSTACK_SERVICES:-$sqs_services}" >"$STATE/sqs/services"
  done
  compose up --detach --wait "$@" >&2 || { compose logs --tail 40 >&2; die "docker compose could not start: $*"; }
  for part; do
    case $part in
      sqs) sqs_is_ready || die "LocalStack runs but made no queue" ;;
      *) compose exec -T "$part" "$part" --host=127.0.0.1 --user=root --batch --skip-column-names \
        --execute='select version()' >"$STATE/$part/version" ;;
    esac
  done
}
