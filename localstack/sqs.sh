# shellcheck shell=bash
# SQS: LocalStack in host mode, from PyPI, without a token.

sqs_region=us-east-1
# SQS, and the services that the tests of infra/ use. A service that is not called is never loaded
# and costs nothing.
sqs_services=sqs,cloudformation,cloudwatch,events,iam,logs,secretsmanager,sns,ssm,sts
sqs_venv=$(venv_of localstack "$ROOT/localstack/requirements.txt")

sqs_endpoint() { echo "http://127.0.0.1:$(read_state sqs port)"; }

sqs_install() {
  need curl curl
  install_venv localstack "$ROOT/localstack/requirements.txt" "15 to 40 s"
}

sqs_start() {
  local address services=${LOCALSTACK_SERVICES:-$sqs_services}
  address=127.0.0.1:$(read_state sqs port)
  echo "$services" >"$STATE/sqs/services"
  # - STRICT_SERVICE_LOADING=1: only the services in SERVICES can be called.
  # - EAGER_SERVICE_LOADING=0: a service loads when it is first called. For SQS alone this takes as
  # long as loading at the start, for many services it is much faster.
  # - SQS_DISABLE_CLOUDWATCH_METRICS=1: otherwise LocalStack reports each message to its own
  # CloudWatch in a separate request, which keeps it busy for minutes after a load test.
  # - OVERRIDE_IN_DOCKER=0: if LocalStack takes this machine for its container, it shares one folder
  # with every other LocalStack, and they may delete it.
  launch sqs env OVERRIDE_IN_DOCKER=0 \
    SERVICES="$services" STRICT_SERVICE_LOADING=1 EAGER_SERVICE_LOADING=0 \
    GATEWAY_LISTEN="$address" LOCALSTACK_HOST="$address" \
    SQS_ENDPOINT_STRATEGY=path FILESYSTEM_ROOT="$STATE/sqs/fs" \
    SQS_DISABLE_CLOUDWATCH_METRICS=1 DISABLE_EVENTS=1 SKIP_SSL_CERT_DOWNLOAD=1 DNS_ADDRESS=0 \
    "$sqs_venv/bin/python" "$ROOT/localstack/localstack_loopback.py"
}

# The AWS CLI is one of LocalStack's packages. .local/bin/aws runs it with the endpoint of this
# LocalStack, and has the same arguments as on AWS.
aws_cli() {
  mkdir -p "$STATE/sqs" "$STATE/bin"
  sqs_install
  cat >"$STATE/bin/aws.new" <<END
#!/bin/sh
# Written by localstack/up. Version 1 of the CLI needs the endpoint as an option, and reads the
# region only from AWS_DEFAULT_REGION.
export AWS_DEFAULT_REGION=$sqs_region AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
exec '$sqs_venv/bin/aws' --endpoint-url "\${AWS_ENDPOINT_URL:-$(sqs_endpoint)}" "\$@"
END
  chmod +x "$STATE/bin/aws.new"
  mv "$STATE/bin/aws.new" "$STATE/bin/aws"
}

sqs_call() { # action json: prints the response; fails if it is an error
  # LocalStack does not check the signature, but reads the region from this header.
  curl --silent --fail --noproxy '*' --max-time 10 "$(sqs_endpoint)/" --data "$2" \
    -H 'Content-Type: application/x-amz-json-1.0' -H "X-Amz-Target: AmazonSQS.$1" \
    -H "Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/$sqs_region/sqs/aws4_request, \
SignedHeaders=host, Signature=none"
}

# LocalStack is ready when the queue exists. It keeps queues only in memory, so every start creates
# the queue again.
sqs_is_ready() {
  local name='"QueueName":"projectionist.fifo"' size response
  curl --silent --fail --noproxy '*' --max-time 5 "$(sqs_endpoint)/_localstack/health" \
    >"$STATE/sqs/health" || return 1
  sed -n 's/.*"version": *"\([^"]*\)".*/\1/p' "$STATE/sqs/health" >"$STATE/sqs/version"
  # Not every version accepts the newer size limit of SQS.
  response=$(sqs_call GetQueueUrl "{$name}") || for size in 1048576 262144; do
    response=$(sqs_call CreateQueue "{$name,\"Attributes\":{\"FifoQueue\":\"true\",
      \"ContentBasedDeduplication\":\"false\",\"VisibilityTimeout\":\"30\",
      \"ReceiveMessageWaitTimeSeconds\":\"0\",\"MaximumMessageSize\":\"$size\"}}") && break
  done
  sed -n 's/.*"QueueUrl": *"\([^"]*\)".*/\1/p' <<<"$response" >"$STATE/sqs/queue_url"
  [[ -s $STATE/sqs/queue_url ]]
}
