"""Makes a Journal of a URL."""

from celery import Celery

from agentmesh import plugins
from agentmesh.celery.app import journal_url, same_server
from agentmesh.celery.publisher import publisher_for
from agentmesh.config import Config
from agentmesh.journal.journal import Journal
from agentmesh.journal.redis import RedisJournal


def make_journal(config: Config, app: Celery, journal: str | Journal = "") -> Journal:
    """The journal of these settings, by the scheme of its URL; a publisher sends what its scripts do not push.

    Args:
        journal: a URL, or a Journal, which is returned as it is; "" for the one of the settings.

    Raises:
        ConfigError: no journal is set and the broker cannot hold one, or no plugin makes journals of this scheme.
    """
    if not isinstance(journal, str):
        return journal
    broker = str(app.conf.broker_url or config.broker)
    url = journal or journal_url(broker, config.journal)
    scheme = url.partition(":")[0].lower()
    factory = plugins.load_plugin("journals", scheme)
    # kombu adds the prefix of the broker's keys, and the scripts do not know it.
    has_key_prefix = bool((app.conf.broker_transport_options or {}).get("global_keyprefix"))
    has_scripts = isinstance(factory, type) and issubclass(factory, RedisJournal)
    push = has_scripts and same_server(broker, url) and not has_key_prefix
    instance: Journal = plugins.make_plugin(
        "journals", scheme, url, prefix=config.prefix, push=push, send=None if push else publisher_for(app),
        ttl_ms=round(config.lease_s * 1000), retain_ms=round(config.retain_days * 86_400_000),
    )  # fmt: skip
    return instance
