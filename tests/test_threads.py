import asyncio
import os
import signal
import threading
import time

import pytest

from agent.threads import in_thread, pause, signals_wait


def test_the_result_and_the_exception_come_back() -> None:
    assert asyncio.run(in_thread(lambda: divmod(7, 2))) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_thread(lambda: divmod(7, 0)))


def test_a_cancelled_caller_hears_of_it_after_the_thread_has_ended() -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def device_request() -> None:
        began.set()
        may_end.wait(10)
        ended.set()

    async def story() -> None:
        task = asyncio.create_task(in_thread(device_request))
        await asyncio.to_thread(began.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # also when asked twice
        await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(story())


def test_work_that_may_end_early_is_told_to() -> None:
    began, stop = threading.Event(), threading.Event()

    def download() -> bool:
        began.set()
        return stop.wait(10)

    async def story() -> None:
        task = asyncio.create_task(in_thread(download, on_cancel=stop.set))
        await asyncio.to_thread(began.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stop.is_set()

    asyncio.run(story())


def test_a_pause_in_a_thread_ends_with_its_caller_and_says_so() -> None:
    began = threading.Event()
    answers: list[bool] = []

    def device_request() -> None:
        answers.append(pause(0.0))
        began.set()
        answers.append(pause(60.0))

    async def story() -> None:
        task = asyncio.create_task(in_thread(device_request))
        await asyncio.to_thread(began.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(story(), 30))
    assert answers == [True, False]


def test_a_cancelled_thread_leaves_the_pauses_of_others_alone() -> None:
    async def story() -> bool:
        task = asyncio.create_task(in_thread(lambda: pause(60.0)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await in_thread(lambda: pause(0.0))

    assert asyncio.run(asyncio.wait_for(story(), 30))
    assert pause(0.0), "outside of any"


@pytest.mark.parametrize("others", [0, 1])
def test_a_signal_waits_for_the_end_of_device_work(others: int) -> None:
    """Also when the kernel gives it to another thread, which has not blocked it."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(others)]
    for thread in threads:
        thread.start()
    done = False
    try:
        with pytest.raises(KeyboardInterrupt), signals_wait():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            done = True
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
