# shellcheck shell=bash
# ministack, a second implementation of AWS for the tests of infra/. Each test runs one of its
# own, so ministack is not a part that localstack/up starts.

# Installs ministack. .local/bin/ministack-python is the interpreter that has its packages.
ministack_install() {
  local list=$ROOT/localstack/ministack-requirements.txt
  install_venv ministack "$list" "5 to 15 s"
  mkdir -p "$STATE/bin"
  printf '#!/bin/sh\n# Written by localstack/up.\nexec "%s" "$@"\n' \
    "$(venv_of ministack "$list")/bin/python" >"$STATE/bin/ministack-python.new"
  chmod +x "$STATE/bin/ministack-python.new"
  mv "$STATE/bin/ministack-python.new" "$STATE/bin/ministack-python"
}
