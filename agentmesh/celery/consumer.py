"""Celery's consumer as our workers need it: local acks, quick reconnects, and a loop that a thread can stop."""

import contextlib
from typing import Any, ClassVar

from celery.bootsteps import RUN
from celery.exceptions import WorkerShutdown
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer
from celery.worker.consumer.tasks import Tasks
from celery.worker.state import maybe_shutdown
from kombu.common import QoS
from kombu.utils.url import maybe_sanitize_url
from redis.exceptions import ResponseError

from agentmesh.celery.broker import consumer_client_name
from agentmesh.celery.lanes import REALTIME_POLL_S, Lanes
from agentmesh.celery.rabbitmq import declare_queues, heartbeat_s, kombu_queue, on_rabbit, with_socket_limits
from agentmesh.celery.rabbitmq_consumer import AdmissionQueue, UnackedMessages, rabbitmq_loop
from agentmesh.celery.redis_transport import MALFORMED, PrefetchRoom, enable_batching

logger = get_logger("agentmesh.consumer")

HEALTH_CHECK_S = 5  # a blocking pop without any reply for so long has lost its connection; kombu's default is 25 s
FULL_POLL_S = 0.1  # how long a full worker waits for a step to end before it polls again
DRAIN_TIMEOUT_S = 1.2  # of one wait for a message: longer than a blocking pop, or each pop would wake the thread


def thread_loop(
    obj: Any, connection: Any, consumer: Any, blueprint: Any, hub: Any, qos: Any, *_: Any, **__: Any
) -> None:
    """Consume until the blueprint leaves RUN. Celery's own synloop checks a process-wide flag, and only every 2 s."""
    consumer.on_message = obj.create_task_handler()
    consumer.consume()
    obj.on_ready()
    prefetch: Any = getattr(consumer.channel, "qos", None)  # None on AMQP, where the broker counts
    if isinstance(prefetch, PrefetchRoom):
        prefetch.admits = getattr(obj.controller, "admits", None)
        prefetch.in_pool = lambda: obj.pool.in_flight
        prefetch.leaving = lambda: blueprint.state != RUN
    while blueprint.state == RUN and obj.connection:
        if qos.prev != qos.value:
            qos.update()
        obj.perform_pending_operations()
        full = prefetch is not None and not prefetch.can_consume()
        if full:  # we take nothing until a step ends, and drain_events would not notice that end
            obj.pool.room.clear()
            if not prefetch.can_consume():
                obj.pool.room.wait(FULL_POLL_S)
        try:
            if isinstance(prefetch, PrefetchRoom) and prefetch.narrow:
                poll_realtime(obj, connection, prefetch)
            else:
                connection.drain_events(timeout=0.001 if full and not prefetch.can_consume() else DRAIN_TIMEOUT_S)
        except TimeoutError:
            pass
        except ResponseError as e:
            if not str(e).startswith("MISCONF"):
                raise
            logger.warning("the broker rejects writes (%s); retrying", e)  # its disk is full; running steps continue
            obj.pool.room.clear()  # it may have been set long ago, and would not wait
            obj.pool.room.wait(DRAIN_TIMEOUT_S)
        except OSError:
            if blueprint.state == RUN:
                raise


def poll_realtime(obj: Any, connection: Any, prefetch: PrefetchRoom) -> None:
    """Take what is in the realtime lane; if nothing, wait a moment, or until a step's end makes room."""
    obj.pool.room.clear()
    prefetch.at_once = True
    try:
        connection.drain_events(timeout=0)
    except TimeoutError:
        if prefetch.narrow:
            obj.pool.room.wait(REALTIME_POLL_S)
    finally:
        prefetch.at_once = False


class ConsumeOwnQueues(Tasks):  # type: ignore[misc]  # Celery has no types
    """Celery's step that begins to consume: from this worker's queues. The app's registry has those of the newest worker.

    On RabbitMQ they are quorum queues that we declare, regardless of the app's conf.
    """

    name = Tasks.name  # it takes the place of Celery's

    def start(self, c: Any) -> None:
        """Begin to consume."""
        names = getattr(c.controller, "own_queues", None)
        if names is None:
            super().start(c)
            return
        c.update_strategies()
        rabbit = on_rabbit(c.app)
        if rabbit:
            declare_queues(c.connection, names)
        c.qos_global = False  # quorum queues have no other, and on Redis it makes no difference
        prefetch = (c.unacked.prefetch if c.unacked is not None else 0) or c.initial_prefetch_count
        c.connection.default_channel.basic_qos(0, prefetch, False)
        c.task_consumer = c.app.amqp.Consumer(
            c.connection, queues=[kombu_queue(q) if rabbit else c.app.amqp.queues[q] for q in names], accept=["json"],
            auto_declare=not rabbit, on_decode_error=c.on_decode_error,
        )  # fmt: skip
        qos: Any = QoS  # kombu has no types for it
        c.qos = qos(
            lambda prefetch_count: c.task_consumer.qos(prefetch_count=prefetch_count, apply_global=False),
            prefetch,
        )
        c.qos.prev = c.qos.value  # basic_qos above has sent it


class MeshConsumer(Consumer):  # type: ignore[misc]  # Celery has no types
    """Pass it to a worker as `consumer_cls=`; it leaves the app's own settings alone.

    On Redis its connection has no ack emulation: leases in the journal do that work, and an ack is local counting.
    """

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        """Celery's, with our queues and without delayed delivery, which declares 28 exchanges for an eta that we never use."""

        default_steps: ClassVar[list[Any]] = [
            s for s in Consumer.Blueprint.default_steps if not s.endswith(":DelayedDelivery")
        ]

        def _finalize_steps(self, steps: Any) -> list[Any]:
            return [ConsumeOwnQueues if step is Tasks else step for step in super()._finalize_steps(steps)]

    client_name: str
    connection: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = getattr(self.controller, "own_queues", None)
        self.client_name = consumer_client_name(self.app.amqp.queues.consume_from if own is None else own)
        self.unacked: UnackedMessages | None = None
        if self.hub is None:
            self.loop = thread_loop
            admits = getattr(self.controller, "admits", None)
            if isinstance(admits, Lanes):
                self.pool.on_skipped = admits.give_turn_back
            if on_rabbit(self.app):
                self.loop = rabbitmq_loop
                self.unacked = UnackedMessages(self) if admits is None else AdmissionQueue(self, admits)
                self.pool.keep_alive = self.unacked.keep_alive

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        """An open connection, whose Redis clients are named by `consumer_client_name`."""
        if self.unacked is not None:
            return self.ensure_connected(
                with_socket_limits(self.app.connection_for_read(heartbeat=int(heartbeat_s(self.app))))
            )
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        is_redis = connection.get_transport_cls().driver_type == "redis"
        enable_batching(connection)
        if is_redis:
            connection.transport_options = {
                **(connection.transport_options or {}), "ack_emulation": False, "client_name": self.client_name,
                "health_check_interval": HEALTH_CHECK_S,
            }  # fmt: skip
        self.ensure_connected(connection)
        if is_redis:
            # The journal re-sends what is un-acked when the channel closes. Celery's own restoring would raise while the
            # broker does not respond, and the worker would exit.
            connection.default_channel.do_restore = False
        return connection

    def ensure_connected(self, conn: Any) -> Any:
        """Retry for as long as the worker lives: a broker that restarts is back within a second."""

        def failed(error: Exception, interval_s: float) -> None:
            url = maybe_sanitize_url(self.app.conf.broker_url)
            logger.warning("no broker responds at %s (%s); retrying in %.1f s", url, error, interval_s)
            self._exit_if_closing()

        conn.ensure_connection(
            failed, None, interval_start=0.1, interval_step=0.2, interval_max=2.0, callback=self._exit_if_closing
        )
        self.first_connection_attempt = False
        return conn

    def _exit_if_closing(self) -> None:
        maybe_shutdown()
        if self.blueprint.state not in (None, RUN):
            raise WorkerShutdown(0)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Nothing: `ensure_connected` has logged it."""

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Drop the connection; running steps continue, and their acks are dropped with its channel."""
        logger.warning("lost the connection to the broker (%r); reconnecting", exc)
        connection, self.connection = self.connection, None
        with contextlib.suppress(Exception):
            connection.collect(socket_timeout=1.0)
        with contextlib.suppress(Exception):
            connection.close()

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's handler, guarded: a malformed body under one of our task names would end it, and the worker."""
        handle = super().create_task_handler(*args, **kwargs)

        def handled(message: Any) -> None:
            try:
                handle(message)
            except MALFORMED as e:
                self.on_invalid_task(None, message, e)

        return handled

    def call_soon_ack(self, p: Any, *args: Any, **kwargs: Any) -> Any:
        """On RabbitMQ send acks from the thread that reads: two threads on one socket would change each other's timeouts."""
        if self.unacked is None:
            return super().call_soon_ack(p, *args, **kwargs)
        return self.unacked.acknowledge(p, args, kwargs)

    def unblock(self) -> None:
        """Interrupt the wait for the broker, from another thread: a blocking pop would delay the shutdown by a second."""
        if self.unacked is not None:
            self.unacked.waker.wake()
            return
        with contextlib.suppress(Exception):  # the broker may not respond: then the shutdown takes that second
            connection = self.connection
            if connection is None or connection.transport.driver_type != "redis":
                return
            client = connection.default_channel._create_client()
            for other in client.client_list():
                if other["name"] == self.client_name and "b" in other["flags"]:
                    client.client_unblock(int(other["id"]))


def broker_error(app: Any, timeout_s: float) -> Exception | None:
    """None when the app's broker responds, else the error of connecting."""
    connection = app.connection_for_read(connect_timeout=timeout_s)
    if connection.get_transport_cls().driver_type == "redis":
        connection.transport_options = {
            **(connection.transport_options or {}), "socket_connect_timeout": timeout_s, "socket_timeout": timeout_s,
        }  # fmt: skip
    try:
        connection.connect()
    except (TimeoutError, OSError, *connection.connection_errors, *connection.channel_errors) as error:
        return error  # type: ignore[no-any-return]  # the tuple is Celery's, untyped
    finally:
        connection.release()
    return None
