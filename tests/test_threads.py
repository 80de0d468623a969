import asyncio
import threading

import pytest

from agent.threads import in_thread


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
