# shellcheck shell=bash
# SQS: LocalStack in host mode, from PyPI, without a token.

sqs_region=us-east-1
# SQS, and what infra/ is tried out on. A service that nobody calls is never loaded, and costs
# nothing.
sqs_services=sqs,cloudformation,cloudwatch,events,iam,logs,secretsmanager,sns,ssm,sts
# The name changes with the list, so that an upgrade never runs on the packages of before.
sqs_venv=$CACHE/localstack-$(cksum <"$ROOT/localstack/requirements.txt" | cut -d' ' -f1)

sqs_endpoint() { echo "http://127.0.0.1:$(read_state sqs port)"; }

python_311() { # prints a Python 3.11; this LocalStack does not load on others
  local candidate
  for candidate in python3.11 /usr/bin/python3.11 python3; do
    # Run it: a version manager's shim exists for versions that are not there.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo 3.11 # uv may find or download one
}

sqs_install() {
  local uv log=$STATE/sqs/install.log
  need curl curl
  [[ ! -e $sqs_venv/complete ]] || return 0
  # uv brings roots of its own, which know nothing of a company's proxy.
  [[ ! -e /etc/ssl/certs/ca-certificates.crt ]] || export UV_SYSTEM_CERTS=1
  log "installing LocalStack (15 to 40 s)"
  if ! uv=$(command -v uv); then
    uv=$CACHE/uv/bin/uv
    need python3 python3
    # Debian's python3 comes without what venv needs.
    python3 -c 'import ensurepip' 2>/dev/null || apt_install python3-venv
    [[ -x $uv ]] || { python3 -m venv --clear "$CACHE/uv" && "$CACHE/uv/bin/pip" install -q uv; } >"$log" 2>&1 ||
      { tail -n 20 "$log" >&2; die "uv could not be installed from PyPI; above is the end of $log"; }
  fi
  rm -rf "$sqs_venv"
  "$uv" venv -q --no-config --python "$(python_311)" "$sqs_venv" >>"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; die "LocalStack needs Python 3.11 and none was found: install python3.11, or start a Docker engine"; }
  # A cache would keep every package twice.
  "$uv" pip install -q --no-cache --require-hashes --python "$sqs_venv/bin/python" -r "$ROOT/localstack/requirements.txt" >>"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; die "LocalStack could not be installed from PyPI; above is the end of $log"; }
  touch "$sqs_venv/complete"
}

sqs_start() {
  local address services=${LOCALSTACK_SERVICES:-$sqs_services}
  address=127.0.0.1:$(read_state sqs port)
  echo "$services" >"$STATE/sqs/services"
  # Services load when first called: for SQS alone that is as quick as beforehand, for many it is
  # much quicker. It would tell its own CloudWatch of each message in a request of its own, and be
  # busy with that for minutes after a load. Where it takes this machine for its container it would
  # share one folder with every other LocalStack, and lose it to them.
  launch sqs env OVERRIDE_IN_DOCKER=0 SERVICES="$services" STRICT_SERVICE_LOADING=1 EAGER_SERVICE_LOADING=0 \
    GATEWAY_LISTEN="$address" LOCALSTACK_HOST="$address" SQS_ENDPOINT_STRATEGY=path FILESYSTEM_ROOT="$STATE/sqs/fs" \
    SQS_DISABLE_CLOUDWATCH_METRICS=1 DISABLE_EVENTS=1 SKIP_SSL_CERT_DOWNLOAD=1 DNS_ADDRESS=0 \
    "$sqs_venv/bin/python" "$ROOT/localstack/localstack_loopback.py"
}

# The AWS CLI comes with LocalStack's own packages. As .local/bin/aws it speaks to this LocalStack,
# and is called as on AWS.
aws_cli() {
  mkdir -p "$STATE/sqs" "$STATE/bin"
  sqs_install
  cat >"$STATE/bin/aws.new" <<END
#!/bin/sh
# Made by localstack/up. Version 1 of the CLI wants the endpoint spelled out, and knows the region
# by this name only.
export AWS_DEFAULT_REGION=$sqs_region AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
exec '$sqs_venv/bin/aws' --endpoint-url "\${AWS_ENDPOINT_URL:-$(sqs_endpoint)}" "\$@"
END
  chmod +x "$STATE/bin/aws.new"
  mv "$STATE/bin/aws.new" "$STATE/bin/aws"
}

sqs_call() { # action json: prints the answer; fails where it is an error
  # LocalStack checks no signature, but reads the region from where one would be.
  curl --silent --fail --noproxy '*' --max-time 10 "$(sqs_endpoint)/" --data "$2" \
    -H 'Content-Type: application/x-amz-json-1.0' -H "X-Amz-Target: AmazonSQS.$1" \
    -H "Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/$sqs_region/sqs/aws4_request, SignedHeaders=host, Signature=none"
}

# The queue belongs to being ready: LocalStack keeps it in memory only, so that every start makes it
# anew.
sqs_is_ready() {
  local name='"QueueName":"projectionist.fifo"' size answer
  curl --silent --fail --noproxy '*' --max-time 5 "$(sqs_endpoint)/_localstack/health" >"$STATE/sqs/health" || return 1
  sed -n 's/.*"version": *"\([^"]*\)".*/\1/p' "$STATE/sqs/health" >"$STATE/sqs/version"
  answer=$(sqs_call GetQueueUrl "{$name}") || for size in 1048576 262144; do # not every version takes SQS's newer limit
    answer=$(sqs_call CreateQueue "{$name,\"Attributes\":{\"FifoQueue\":\"true\",\"ContentBasedDeduplication\":\"false\",
      \"VisibilityTimeout\":\"30\",\"ReceiveMessageWaitTimeSeconds\":\"0\",\"MaximumMessageSize\":\"$size\"}}") && break
  done
  sed -n 's/.*"QueueUrl": *"\([^"]*\)".*/\1/p' <<<"$answer" >"$STATE/sqs/queue_url"
  [[ -s $STATE/sqs/queue_url ]]
}
