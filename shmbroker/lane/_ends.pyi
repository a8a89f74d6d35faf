from shmbroker.lane.ends import CompletionReceiver as CompletionReceiver
from shmbroker.lane.ends import CompletionSender as CompletionSender
from shmbroker.lane.ends import SubmissionReceiver as SubmissionReceiver
from shmbroker.lane.ends import SubmissionSender as SubmissionSender
from shmbroker.lane.ends import spin as spin

LAYOUT_VERSION: int
