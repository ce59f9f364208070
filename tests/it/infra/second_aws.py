"""Runs ministack for a test, and calls it with botocore.

second_aws.py serve    runs the server. A minute of a schedule lasts two seconds.
second_aws.py call ADDRESSreads calls from standard input, one JSON object a line, and prints one
                       answer a line: {"ok": RESPONSE} or {"error": CODE, "message": TEXT}. One
                       process for all calls, because the AWS CLI needs a second for each.
"""

import io
import json
import sys
import zipfile

MINUTE_SECONDS = 2


def serve():
    import runpy

    from ministack.services import eventbridge

    parse = eventbridge._parse_rate_seconds

    def parse_faster(expression):
        seconds = parse(expression)
        return seconds and seconds // 60 * MINUTE_SECONDS

    eventbridge._parse_rate_seconds = parse_faster
    sys.argv = ["ministack"]
    runpy.run_module("ministack", run_name="__main__")


def make_zip(files):
    """A zip file in memory. All files are executable."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o755 << 16
            archive.writestr(info, text)
    return content.getvalue()


def readable(value):
    """A value of a response as JSON: the body of a response as text."""
    return value.read().decode() if hasattr(value, "read") else str(value)


def answer_calls(endpoint):
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import ClientError

    session = botocore.session.get_session()
    clients = {}
    for line in sys.stdin:
        call = json.loads(line)
        keys = tuple(call["credentials"])
        client = clients.get((call["service"], keys))
        if client is None:
            client = session.create_client(
                call["service"],
                region_name="us-east-1",
                endpoint_url=endpoint,
                aws_access_key_id=keys[0],
                aws_secret_access_key=keys[1],
                config=Config(retries={"max_attempts": 0}, s3={"addressing_style": "path"}),
            )
            clients[call["service"], keys] = client
        parameters = call["parameters"]
        if isinstance(parameters.get("Body"), dict):
            parameters["Body"] = make_zip(parameters["Body"])
        try:
            answer = {"ok": client._make_api_call(call["operation"], parameters)}
        except ClientError as error:
            details = error.response["Error"]
            answer = {"error": details["Code"], "message": details["Message"]}
        print(json.dumps(answer, default=readable), flush=True)


if sys.argv[1] == "serve":
    serve()
else:
    answer_calls(sys.argv[2])
