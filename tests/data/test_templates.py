"""Chat templates: what cannot be stopped is refused before, what does not end is stopped, real ones pass."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from mmft.data import templates
from mmft.data.templates import check_template, time_limit
from mmft.errors import DataError
from tests.data import small


@pytest.mark.parametrize(
    "text",
    [
        "{{ 9**9**9 }}",
        "{{ 'a' * 99999999999 }}",
        "{% set x = 99_999 * messages[0].role %}",
        "{{ 'a' * (9999 * 9999) }}",
        "{{ 'a' * 9999 * 9999 * 9999 }}",
    ],
)
def test_operations_that_nothing_can_stop_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="the chat template computes a") as caught:
        check_template("hello\n" + text, where="here")
    assert "in line 2" in str(caught.value) and "model.revision" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        small.CHATML,
        small.SMOLVLM,
        small.QWEN2_VL,
        small.MLLAMA,
        "{{ ' ' * depth }}{{ loop.index * 2 }}",
        "{{ '-' * 20 }} a ** b",
        "{% unknown %}{{",
    ],
)
def test_templates_that_put_messages_together_pass(text: str) -> None:
    check_template(text, where="here")


def test_what_does_not_end_is_stopped_and_the_handler_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.05)
    before = signal.getsignal(signal.SIGVTALRM)
    begin = time.process_time()
    with pytest.raises(DataError, match="ran for more than 0.05 s"), time_limit("here"):
        while True:
            pass
    assert time.process_time() - begin < 1.0
    assert signal.getsignal(signal.SIGVTALRM) == before and signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0.0
    with time_limit("here"):  # what waits takes no processor time
        time.sleep(0.2)


def test_other_threads_are_left_alone() -> None:
    ended = []

    def work() -> None:
        with time_limit("here"):
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]
