import fake_services
import pytest


class Fakes:
    def __init__(self):
        self.replay = fake_services.FakeReplay()
        self.planner = fake_services.FakePlanner()
        self.server, port = fake_services.start(self.replay, self.planner)
        self.address = f"127.0.0.1:{port}"


@pytest.fixture
def fakes():
    made = Fakes()
    yield made
    made.planner.hold.set()
    made.replay.hold_acknowledgements = False
    made.server.stop(0).wait()
