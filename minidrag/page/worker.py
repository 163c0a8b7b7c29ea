"""The thread that does the jobs of the page, one at a time."""

import sys
import threading
import traceback
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from minidrag.page.editor import in_words
from minidrag.page.job import Job, Stopped
from minidrag.system import console

if TYPE_CHECKING:
    from minidrag.page.jobs import Queue


class Worker(threading.Thread):
    """Does the jobs of a queue. The queue's editor is its own."""

    def __init__(self, queue: "Queue"):
        super().__init__(daemon=True)
        self.queue = queue

    def run(self) -> None:
        queue = self.queue
        while True:
            with queue.change:
                while not (job := queue.next()):
                    if queue.closed:
                        return
                    queue.change.wait()
                job.state = "running"
            self.work(job)

    def work(self, job: Job) -> None:
        """Do a job. Whatever happens, the queue goes on, and the job says it in one sentence."""
        try:
            self.queue.editor.do(job)
            job.state = "stopped" if job.message else "done"
        except Stopped:
            job.state, job.message = "stopped", "stopped before anything was dragged"
        except Exception as error:
            job.state, job.message = "failed", explain(error)
            print(f"minidrag: {job.message}", file=sys.stderr)
        job.steps = []  # the latents of a long drag are large
        if job.kind == "edit" and not self.queue.closed:
            self.queue.forget(job)


def explain(error: Exception) -> str:
    """One sentence on why a job failed; a mistake in the program also shows its traceback in the terminal."""
    text = in_words(" ".join(str(error).split()))
    if console.is_out_of_memory(error):
        return "out of memory: try checkpointing, a LoRA batch of 1, or a smaller size"
    if isinstance(error, FloatingPointError):
        return f"{text}: try a smaller drag lr or lora lr"
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        return in_words(" ".join(console.reason(error).split()))
    traceback.print_exception(error)
    return f"a mistake in the program, {type(error).__name__}: {text}"
