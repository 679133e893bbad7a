"""The consumers of a queue, as the broker reports them."""

from agentmesh import Agent, Context, Crew, Queue
from agentmesh.celery.app import make_app
from agentmesh.celery.broker import consumer_count
from agentmesh.mesh import Mesh

A, B = "agentmesh.consumers.a", "agentmesh.consumers.b"


class Echo(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        return task


def mesh_on(broker: str, journal: str) -> Mesh:
    return Mesh(Crew(Echo(), name="consumers", queues=[Queue("a"), Queue("b")]), broker=broker, journal=journal)


def test_on_valkey(valkey, eventually):
    mesh, app = mesh_on(valkey.broker_url, valkey.url), make_app(valkey.broker_url)
    assert consumer_count(app, A) == 0
    with mesh.worker(queues=["a"]):
        with mesh.worker(queues=["a", "b"]):
            assert (consumer_count(app, A), consumer_count(app, B)) == (2, 1)
            elsewhere = make_app(valkey.broker_url.replace("virtual_host=0", "virtual_host=5"))
            assert consumer_count(elsewhere, A) == 0  # another database has other queues
        eventually(lambda: (consumer_count(app, A), consumer_count(app, B)) == (1, 0))
    eventually(lambda: consumer_count(app, A) == 0)
    mesh.close()


def test_on_rabbitmq(rabbitmq, valkey, eventually):
    mesh, app = mesh_on(rabbitmq.url, valkey.url), make_app(rabbitmq.url)
    assert consumer_count(app, A) == 0
    with mesh.worker(queues=["a"]):
        assert (consumer_count(app, A), consumer_count(app, B)) == (1, 0)
    eventually(lambda: consumer_count(app, A) == 0)
    mesh.close()


def test_a_broker_that_is_away_or_does_not_tell(valkey):
    assert consumer_count(make_app("redis://127.0.0.1:1"), A) is None
    assert consumer_count(make_app("amqp://127.0.0.1:1"), A) is None
    assert consumer_count(make_app("memory://"), A) is None
