/* The two ends of the completion queue, compiled: CompletionSender and CompletionReceiver of python_ends.py. */

#include "_ends.h"

typedef struct shmbroker_completion_frame Completion;

/* --- CompletionSender ------------------------------------------------------------------------------------------------------------------------
 *
 * The worker's end of the completion queue: complete().
 *
 *   Before   complete: (call_id, status, queued_ns, compute_ns, body), of 64, 32, 64, 64 bits, and at most TEXT_BYTES of bytes.
 *   After    True, the completion is published and a sleeping client rung for; or False, the queue was full, which is looked at first, and
 *            nothing else was.
 *   Failure  All of it is looked at before a byte of the slot is written. TypeError for what is no tuple, ValueError for one of another length, and
 *            for a body that is too long. What `ring` raises is passed on, and the completion is published all the same.
 */

typedef struct {
    PyObject_HEAD
    Sender sender;
} CompletionSender;

static int completion_sender_init(CompletionSender *self, PyObject *arguments, PyObject *keywords)
{
    return make_sender(&self->sender, arguments, keywords, sizeof(Completion)) ? 0 : -1;
}

static void completion_sender_dealloc(CompletionSender *self)
{
    close_sender(&self->sender);
    free_object((PyObject *)self);
}

/* Fill a slot. 1: published, 0: the queue is full, -1: an error is set. The completion is not a list: nobody changes it meanwhile. */
static int write_completion(Sender *self, PyObject *completion)
{
    uint64_t call_id, status, queued_ns, compute_ns;
    if (!as_unsigned(PyTuple_GET_ITEM(completion, 0), UINT64_MAX, "call_id", &call_id)
        || !as_unsigned(PyTuple_GET_ITEM(completion, 1), UINT32_MAX, "status", &status)
        || !as_unsigned(PyTuple_GET_ITEM(completion, 2), UINT64_MAX, "queued_ns", &queued_ns)
        || !as_unsigned(PyTuple_GET_ITEM(completion, 3), UINT64_MAX, "compute_ns", &compute_ns))
        return -1;
    PyObject *body = PyTuple_GET_ITEM(completion, 4);
    if (!PyBytes_Check(body)) {
        PyErr_SetString(PyExc_TypeError, "a completion's body is bytes");
        return -1;
    }
    size_t text_bytes = (size_t)PyBytes_GET_SIZE(body);
    if (text_bytes > SHMBROKER_TEXT_BYTES) {
        PyErr_Format(PyExc_ValueError, "a text of %zu bytes; a completion carries at most %d", text_bytes, SHMBROKER_TEXT_BYTES);
        return -1;
    }
    uint8_t *slot = shmbroker_claim(&self->queue);
    if (slot == NULL)
        return 0;
    shmbroker_fill_completion(slot, call_id, (uint32_t)status, queued_ns, compute_ns, PyBytes_AS_STRING(body), (uint32_t)text_bytes);
    return commit(self, slot) ? 1 : -1;
}

/* complete(completion) -> bool */
static PyObject *completion_sender_complete(CompletionSender *self, PyObject *completion)
{
    if (!is_made(&self->sender.queue))
        return NULL;
    if (shmbroker_claim(&self->sender.queue) == NULL)
        Py_RETURN_FALSE;
    if (!PyTuple_Check(completion)) {
        PyErr_SetString(PyExc_TypeError, "a completion is a tuple (call_id, status, queued_ns, compute_ns, body: bytes)");
        return NULL;
    }
    if (PyTuple_GET_SIZE(completion) != 5) {
        PyErr_Format(PyExc_ValueError, "a completion has 5 parts, not %zd", PyTuple_GET_SIZE(completion));
        return NULL;
    }
    int written = write_completion(&self->sender, completion);
    return written < 0 ? NULL : PyBool_FromLong(written);
}

static PyMethodDef completion_sender_methods[] = {
    {"complete", METHOD(completion_sender_complete), METH_O, "Write a completion and publish it; False while the queue is full."},
    {NULL},
};

END_TYPE(CompletionSender, completion_sender, "The worker's end of the completion queue. Not thread-safe.")

/* --- CompletionReceiver ----------------------------------------------------------------------------------------------------------------------
 *
 * The client's end of the completion queue: take(), ready().
 *
 *   After    take: the next completion, from a private copy, whose slot may then be filled again; or None. Those that cannot be one are passed over,
 *            a queue full of them at most: a peer could go on for ever. ready: whether something is published, which may be passed over.
 *   Failure  take: only memory can be wanting (MemoryError); then the completion is still there.
 */

typedef struct {
    PyObject_HEAD
    Receiver receiver;
} CompletionReceiver;
_Static_assert(offsetof(CompletionReceiver, receiver) == offsetof(AnyReceiver, receiver), "begins like AnyReceiver");

static int completion_receiver_init(CompletionReceiver *self, PyObject *arguments, PyObject *keywords)
{
    return make_receiver(&self->receiver, arguments, keywords, sizeof(Completion)) ? 0 : -1;
}

static void completion_receiver_dealloc(CompletionReceiver *self)
{
    close_receiver(&self->receiver);
    free_object((PyObject *)self);
}

/* take() -> (call_id, status, queued_ns, compute_ns, body) | None */
static PyObject *completion_receiver_take(CompletionReceiver *self, PyObject *Py_UNUSED(ignored))
{
    Receiver *receiver = &self->receiver;
    if (!is_made(&receiver->queue))
        return NULL;
    for (uint64_t passed = 0; passed <= receiver->queue.mask; passed++) {
        const uint8_t *slot = shmbroker_peek(&receiver->queue);
        if (slot == NULL)
            break;
        Completion frame;
        PyObject *taken = NULL;
        bool possible = shmbroker_copy_completion(slot, &frame);
        if (possible) {
            taken = Py_BuildValue("KkKKy#", frame.call_id, (unsigned long)frame.status, frame.queued_ns, frame.compute_ns,
                                  (const char *)frame.body, (Py_ssize_t)frame.text_bytes);
            if (taken == NULL)
                return NULL;
        }
        shmbroker_advance(&receiver->queue);
        if (possible)
            return taken;
    }
    Py_RETURN_NONE;
}

static PyMethodDef completion_receiver_methods[] = {
    {"take", METHOD(completion_receiver_take), METH_NOARGS, "The next completion, or None."},
    {"ready", METHOD(receiver_ready), METH_NOARGS, "Whether a frame is published and not yet taken."},
    {NULL},
};

END_TYPE(CompletionReceiver, completion_receiver, "The client's end of the completion queue. Not thread-safe.")
