# Runs LocalStack on 127.0.0.1 alone. LocalStack 4.13.1 reads the host in GATEWAY_LISTEN and then
# listens on every address all the same, and where the port is taken it goes on without one; here it
# says so and ends.
import os

from twisted.internet import endpoints


class Loopback(endpoints.TCP4ServerEndpoint):
    def __init__(self, reactor, port):
        super().__init__(reactor, port, interface="127.0.0.1")

    def listen(self, factory):
        return super().listen(factory).addErrback(give_up)


def give_up(failure):
    print(failure.getErrorMessage(), flush=True)
    os._exit(1)


endpoints.TCP4ServerEndpoint = Loopback

from localstack.runtime.main import main  # noqa: E402 (it looks the class up when imported)

main()
