/* The two ends of the submission queue, compiled: SubmissionSender and SubmissionReceiver of python_ends.py. The frames' rules F1..F3 are told in
 * frames.py. */

#include "_ends.h"
#include "_keys.h"

typedef struct shmbroker_submission_frame Submission;

/* --- SubmissionSender ------------------------------------------------------------------------------------------------------------------------
 *
 * The client's end of the submission queue: submit(), nudge().
 *
 *   Before   submit: the template is a FrameTemplate; `offsets` and `generations` have one number for each of its tensors, inputs first; no two calls
 *            that are outstanding have the same call_id.
 *   Who      As above. nudge() beside a submit() in another thread harms nobody: it touches the peer's sleeping word alone.
 *   After    submit: True, the frame is published and a sleeping worker rung for; or False, the queue was full, which is looked at first, and
 *            nothing else was.
 *   Failure  All arguments are looked at before a byte of the slot is written. TypeError where offsets or generations are no sequences, ValueError
 *            where they are not as many as the template's tensors. What `ring` raises is passed on, and the frame is published all the same.
 */

typedef struct {
    PyObject_HEAD
    Sender sender;
    PyObject *packed_name; /* "packed" */
} SubmissionSender;

static int submission_sender_init(SubmissionSender *self, PyObject *arguments, PyObject *keywords)
{
    PyObject *packed_name = PyUnicode_InternFromString("packed");
    if (packed_name == NULL)
        return -1;
    if (!make_sender(&self->sender, arguments, keywords, sizeof(Submission))) {
        Py_DECREF(packed_name);
        return -1;
    }
    self->packed_name = packed_name;
    return 0;
}

static void submission_sender_dealloc(SubmissionSender *self)
{
    close_sender(&self->sender);
    Py_XDECREF(self->packed_name);
    free_object((PyObject *)self);
}

static PyObject *submission_sender_nudge(SubmissionSender *self, PyObject *Py_UNUSED(ignored))
{
    if (!is_made(&self->sender.queue) || !ring_if(&self->sender, shmbroker_nudge(self->sender.peer_sleeping)))
        return NULL;
    Py_RETURN_NONE;
}

static bool is_sequence(PyObject *object, const char *name)
{
    if (PyList_Check(object) || PyTuple_Check(object))
        return true;
    PyErr_Format(PyExc_TypeError, "%s are a list or a tuple", name);
    return false;
}

/* Asked before the numbers are read, and after each: the code of one that is no int may change the list that it stands in. */
static inline bool are_as_many(PyObject *offsets, PyObject *generations, Py_ssize_t tensors)
{
    if (PySequence_Fast_GET_SIZE(offsets) == tensors && PySequence_Fast_GET_SIZE(generations) == tensors)
        return true;
    PyErr_Format(PyExc_ValueError, "%zd offsets and %zd generations for a template of %zd tensors", PySequence_Fast_GET_SIZE(offsets),
                 PySequence_Fast_GET_SIZE(generations), tensors);
    return false;
}

/* Fill a slot from a template's bytes and what differs from call to call. 1: published, 0: the queue is full, -1: an error is set. */
static int write_submission(Sender *self, PyObject *packed, PyObject *const *arguments)
{
    uint64_t call_id, deadline_ns, submitted_ns, offsets[SHMBROKER_MAX_TENSORS], generations[SHMBROKER_MAX_TENSORS];
    int tensors = shmbroker_packed_tensors(PyBytes_AS_STRING(packed), (size_t)PyBytes_GET_SIZE(packed));
    if (tensors < 0) {
        PyErr_Format(PyExc_ValueError, "%zd bytes that are no template of a frame", PyBytes_GET_SIZE(packed));
        return -1;
    }
    if (!is_sequence(arguments[4], "offsets") || !is_sequence(arguments[5], "generations")
        || !are_as_many(arguments[4], arguments[5], tensors) || !as_unsigned(arguments[1], UINT64_MAX, "call_id", &call_id)
        || !as_unsigned(arguments[2], UINT64_MAX, "deadline_ns", &deadline_ns)
        || !as_unsigned(arguments[3], UINT64_MAX, "submitted_ns", &submitted_ns))
        return -1;
    for (int i = 0; i < tensors; i++)
        if (!are_as_many(arguments[4], arguments[5], tensors)
            || !as_unsigned(PySequence_Fast_GET_ITEM(arguments[4], i), UINT64_MAX, "an offset", &offsets[i])
            || !are_as_many(arguments[4], arguments[5], tensors)
            || !as_unsigned(PySequence_Fast_GET_ITEM(arguments[5], i), UINT32_MAX, "a generation", &generations[i]))
            return -1;
    uint8_t *slot = shmbroker_claim(&self->queue);
    if (slot == NULL)
        return 0;
    shmbroker_fill_submission(slot, PyBytes_AS_STRING(packed), (size_t)PyBytes_GET_SIZE(packed), call_id, deadline_ns, submitted_ns);
    for (int i = 0; i < tensors; i++)
        shmbroker_fill_tensor(slot, i, offsets[i], (uint32_t)generations[i]);
    return commit(self, slot) ? 1 : -1;
}

/* submit(template, call_id, deadline_ns, submitted_ns, offsets, generations) -> bool */
static PyObject *submission_sender_submit(SubmissionSender *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (!is_made(&self->sender.queue))
        return NULL;
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError, "submit(template, call_id, deadline_ns, submitted_ns, offsets, generations)");
        return NULL;
    }
    if (shmbroker_claim(&self->sender.queue) == NULL)
        Py_RETURN_FALSE;
    PyObject *packed = PyObject_GetAttr(arguments[0], self->packed_name);
    if (packed == NULL)
        return NULL;
    int written = -1;
    if (PyBytes_Check(packed))
        written = write_submission(&self->sender, packed, arguments);
    else
        PyErr_SetString(PyExc_TypeError, "a template's packed is bytes");
    Py_DECREF(packed);
    return written < 0 ? NULL : PyBool_FromLong(written);
}

static PyMethodDef submission_sender_methods[] = {
    {"nudge", METHOD(submission_sender_nudge), METH_NOARGS, "Wake the peer if it sleeps: a frame will follow in a moment."},
    {"submit", METHOD(submission_sender_submit), METH_FASTCALL, "Write a frame and publish it; False while the queue is full."},
    {NULL},
};

END_TYPE(SubmissionSender, submission_sender, "The client's end of the submission queue. Not thread-safe.")

/* --- SubmissionReceiver ----------------------------------------------------------------------------------------------------------------------
 *
 * The worker's end of the submission queue: take(), ready().
 *
 *   After    take: the next call, from a private copy of its frame (F1), whose slot may then be filled again; or None. Its key is the very
 *            object that was given for the same bytes before, where that is remembered. ready: whether take() has one to give.
 *   Failure  take: only memory can be wanting (MemoryError); then nothing is taken, and the frame is still there.
 */

typedef struct {
    PyObject_HEAD
    Receiver receiver;
    Keys keys;
} SubmissionReceiver;
_Static_assert(offsetof(SubmissionReceiver, receiver) == offsetof(AnyReceiver, receiver), "begins like AnyReceiver");

static int submission_receiver_init(SubmissionReceiver *self, PyObject *arguments, PyObject *keywords)
{
    return make_receiver(&self->receiver, arguments, keywords, sizeof(Submission)) ? 0 : -1;
}

static void submission_receiver_dealloc(SubmissionReceiver *self)
{
    close_receiver(&self->receiver);
    forget_keys(&self->keys);
    free_object((PyObject *)self);
}

/* take() -> (call_id, deadline_ns, submitted_ns, key, frame) | None */
static PyObject *submission_receiver_take(SubmissionReceiver *self, PyObject *Py_UNUSED(ignored))
{
    Receiver *receiver = &self->receiver;
    if (!is_made(&receiver->queue))
        return NULL;
    const uint8_t *slot = shmbroker_peek(&receiver->queue);
    if (slot == NULL)
        Py_RETURN_NONE;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, sizeof(Submission));
    if (bytes == NULL)
        return NULL;
    Submission *frame = (Submission *)PyBytes_AS_STRING(bytes);
    shmbroker_copy_submission(slot, frame);
    PyObject *key = key_of(&self->keys, frame);
    if (key == NULL) {
        Py_DECREF(bytes);
        return NULL;
    }
    PyObject *taken = Py_BuildValue("KKKNN", frame->call_id, frame->deadline_ns, frame->submitted_ns, key, bytes);
    if (taken != NULL)
        shmbroker_advance(&receiver->queue);
    return taken;
}

static PyMethodDef submission_receiver_methods[] = {
    {"take", METHOD(submission_receiver_take), METH_NOARGS, "The next call, or None."},
    {"ready", METHOD(receiver_ready), METH_NOARGS, "Whether a frame is published and not yet taken."},
    {NULL},
};

END_TYPE(SubmissionReceiver, submission_receiver, "The worker's end of the submission queue. Not thread-safe.")
