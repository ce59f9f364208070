# Runs LocalStack on 127.0.0.1 only. LocalStack 4.13.1 reads the host in GATEWAY_LISTEN but listens
# on every address, and if the port is in use, it continues without one. This script prints the
# error and exits instead.
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

from localstack.runtime.main import main  # noqa: E402 (the import looks up the class)

main()
