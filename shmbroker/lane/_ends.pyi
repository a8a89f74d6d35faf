from shmbroker.lane.doorbell import fence as fence
from shmbroker.lane.python_ends import CompletionReceiver as CompletionReceiver
from shmbroker.lane.python_ends import CompletionSender as CompletionSender
from shmbroker.lane.python_ends import SubmissionReceiver as SubmissionReceiver
from shmbroker.lane.python_ends import SubmissionSender as SubmissionSender
from shmbroker.lane.python_ends import after_sleep as after_sleep
from shmbroker.lane.python_ends import before_sleep as before_sleep
from shmbroker.lane.python_ends import spin as spin

LAYOUT_VERSION: int
