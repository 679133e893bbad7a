"""A chord of the user's whose state Celery's Redis backend let go of while a run of ours was still waiting for a person.

Celery forgets how large a chord is `result_expires` after its last part came, and then counts for ever: no body, no
error. Whoever comes later than that fails the chord, so that its result and its errbacks say what happened.
"""

import logging
from typing import Any

from celery import signature
from celery.exceptions import ChordError
from celery.states import READY_STATES

log = logging.getLogger("agentmesh")

DONE_S = 86_400  # how long the other late parts find that it was said


def fail_if_lapsed(app: Any, backend: Any, request: Any, waited_s: float) -> bool:
    """Whether the chord of this part was gone, and is failed now.

    Args:
        request: the part's, with its chord and group.
        waited_s: since the part was begun.
    """
    expires_s = getattr(backend, "chord_expires", None)
    if not hasattr(backend, "_chord_part_return_script") or not expires_s or waited_s < expires_s:
        return False
    size, claim = (backend.get_key_for_group(request.group, part) for part in (".s", ".c"))
    body = signature(request.chord, app=app)
    # Told a second time: an ended chord has no size either.
    if backend.client.exists(size, claim) or any(backend.get_state(id) in READY_STATES for id in _ids(body)):
        return False
    said = (
        f"run {request.id} took {waited_s:.0f} s, and Celery forgets a chord {expires_s:.0f} s after its last part: set "
        "`result_chord_expires` of your app longer than your longest wait"
    )
    log.error(said)
    try:
        raise ChordError(said)  # Celery wants it from the stack
    except ChordError as error:
        backend.chord_error_from_stack(body, error)
    backend.client.set(claim, "done", ex=DONE_S)
    return True


def _ids(body: Any) -> list[str]:
    return [one.id for one in (body, *(getattr(body, "tasks", None) or ())) if getattr(one, "id", None)]
