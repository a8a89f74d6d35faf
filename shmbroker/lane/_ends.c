/* The ends of the queues, compiled: what shmbroker/lane/python_ends.py says, for a tenth of its cost.
 *
 * Optional: without a compiler, or with SHMBROKER_PURE_PYTHON=1, the classes of python_ends.py do the same, and the same tests run on both. The queues'
 * rules Q1..Q3 are told in queue.py, the fence D1 in doorbell.py, the frames' rules F1..F3 in frames.py; the layout is shmbroker.h.
 *
 * Nothing here believes the other side: every position is counted privately, every frame is copied before it is looked at, and every count in
 * the copy is clamped before it is used.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>

#include "../memory/shmbroker.h"

typedef struct shmbroker_submission_frame Submission;
typedef struct shmbroker_completion_frame Completion;
typedef struct shmbroker_tensor_descriptor Descriptor;

enum {
    SEQUENCE_BYTES = 8,
    KEYS = 256,                /* frames recognised by their bytes alone, so that Python hashes each only once; a power of two */
    LOOKS_FOR_EACH_CLOCK = 32, /* a look costs a few ns, the clock some 25 */
    IMPOLITE_NS = 50000,       /* a spin that takes longer makes way for whoever wants the core, each time it looks at the clock */
};

/* One end of one queue. Which fields are used depends on the end. */
typedef struct {
    PyObject_HEAD
    Py_buffer map;
    uint8_t *slots;
    uint64_t slot_bytes;
    uint64_t mask;
    uint64_t position;
    uint64_t known_taken;
    _Atomic uint64_t *taken;
    _Atomic uint64_t *peer_sleeping; /* senders */
    PyObject *ring;                  /* senders: wakes the peer */
    PyObject *packed_name;           /* SubmissionSender: "packed" */
    PyObject *keys[KEYS];            /* SubmissionReceiver */
} End;

static inline uint8_t *slot_of(const End *end, uint64_t position)
{
    return end->slots + (position & end->mask) * end->slot_bytes;
}

static inline _Atomic uint64_t *sequence_of(uint8_t *slot)
{
    return (_Atomic uint64_t *)slot;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* --- the making of an end ------------------------------------------------------------------------------------------------------------- */

static bool map_words(End *self, unsigned long long offset, _Atomic uint64_t **word)
{
    if (offset % 8 || offset > (unsigned long long)self->map.len - 8) {
        PyErr_Format(PyExc_ValueError, "a word at %llu does not lie in a segment of %zd bytes", offset, self->map.len);
        return false;
    }
    *word = (_Atomic uint64_t *)((uint8_t *)self->map.buf + offset);
    return true;
}

/* Segment, offset of the first slot, and offset of the word `taken`: what every end needs. */
static bool open_end(End *self, PyObject *segment, unsigned long long offset, unsigned long long taken, uint64_t slot_bytes)
{
    PyObject *map = PyObject_GetAttrString(segment, "map");
    if (map == NULL)
        return false;
    int failed = PyObject_GetBuffer(map, &self->map, PyBUF_WRITABLE);
    Py_DECREF(map);
    if (failed)
        return false;
    PyObject *geometry = PyObject_GetAttrString(segment, "geometry");
    PyObject *number = geometry ? PyObject_GetAttrString(geometry, "depth") : NULL;
    Py_XDECREF(geometry);
    if (number == NULL)
        return false;
    unsigned long long depth = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (PyErr_Occurred())
        return false;
    unsigned long long room = (unsigned long long)self->map.len;
    if (depth == 0 || (depth & (depth - 1)) || offset % 8 || offset > room || depth > (room - offset) / slot_bytes) {
        PyErr_Format(PyExc_ValueError, "%llu slots of %llu bytes at %llu do not lie in a segment of %zd bytes", depth,
                     (unsigned long long)slot_bytes, offset, self->map.len);
        return false;
    }
    self->slots = (uint8_t *)self->map.buf + offset;
    self->slot_bytes = slot_bytes;
    self->mask = depth - 1;
    return map_words(self, taken, &self->taken);
}

static int init_sender(End *self, PyObject *arguments, PyObject *keywords, uint64_t slot_bytes)
{
    static char *names[] = {"segment", "offset", "taken_offset", "sleeping_offset", "ring", NULL};
    PyObject *segment, *ring;
    unsigned long long offset, taken, sleeping;
    if (self->map.obj != NULL) {
        PyErr_SetString(PyExc_TypeError, "an end is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OKKKO", names, &segment, &offset, &taken, &sleeping, &ring))
        return -1;
    if (!open_end(self, segment, offset, taken, slot_bytes) || !map_words(self, sleeping, &self->peer_sleeping))
        return -1;
    self->ring = Py_NewRef(ring);
    return 0;
}

static int init_receiver(End *self, PyObject *arguments, PyObject *keywords, uint64_t slot_bytes)
{
    static char *names[] = {"segment", "offset", "taken_offset", NULL};
    PyObject *segment;
    unsigned long long offset, taken;
    if (self->map.obj != NULL) {
        PyErr_SetString(PyExc_TypeError, "an end is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OKK", names, &segment, &offset, &taken))
        return -1;
    return open_end(self, segment, offset, taken, slot_bytes) ? 0 : -1;
}

static void end_dealloc(End *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->map.obj != NULL)
        PyBuffer_Release(&self->map);
    Py_XDECREF(self->ring);
    Py_XDECREF(self->packed_name);
    for (int i = 0; i < KEYS; i++)
        Py_XDECREF(self->keys[i]);
    type->tp_free(self);
    Py_DECREF(type);
}

/* --- what all senders and all receivers do -------------------------------------------------------------------------------------------- */

/* The slot to fill, or NULL while the queue is full (Q1). The consumer's word can be anything: it is clamped. */
static uint8_t *claim(End *self)
{
    if (self->position - self->known_taken > self->mask) {
        uint64_t taken = atomic_load_explicit(self->taken, memory_order_acquire);
        self->known_taken = taken < self->position ? taken : self->position;
        if (self->position - self->known_taken > self->mask)
            return NULL;
    }
    return slot_of(self, self->position);
}

/* Wake the peer if it sleeps; its word is taken down, so that it is rung for once (D4). */
static bool wake(End *self)
{
    if (atomic_load_explicit(self->peer_sleeping, memory_order_relaxed)) {
        atomic_store_explicit(self->peer_sleeping, 0, memory_order_relaxed);
        PyObject *rung = PyObject_CallNoArgs(self->ring);
        if (rung == NULL)
            return false;
        Py_DECREF(rung);
    }
    return true;
}

/* Publish the slot (Q2) and wake the peer if it sleeps (D1). */
static bool commit(End *self, uint8_t *slot)
{
    self->position += 1;
    atomic_store_explicit(sequence_of(slot), self->position, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    return wake(self);
}

/* nudge(): a frame will follow in a moment; who sleeps needs longer than that to wake up */
static PyObject *sender_nudge(End *self, PyObject *Py_UNUSED(ignored))
{
    if (!wake(self))
        return NULL;
    Py_RETURN_NONE;
}

static inline bool is_ready(const End *self)
{
    uint8_t *slot = slot_of(self, self->position);
    return atomic_load_explicit(sequence_of(slot), memory_order_acquire) == self->position + 1;
}

/* The frame has been copied: its slot may be filled again (Q3). */
static void advance(End *self)
{
    self->position += 1;
    atomic_store_explicit(self->taken, self->position, memory_order_release);
}

static PyObject *receiver_ready(End *self, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(is_ready(self));
}

static bool as_u64(PyObject *number, uint64_t *value)
{
    *value = PyLong_AsUnsignedLongLong(number);
    return !(*value == (uint64_t)-1 && PyErr_Occurred());
}

/* --- SubmissionSender ------------------------------------------------------------------------------------------------------------------- */

static int submission_sender_init(End *self, PyObject *arguments, PyObject *keywords)
{
    if (init_sender(self, arguments, keywords, sizeof(Submission)) < 0)
        return -1;
    self->packed_name = PyUnicode_InternFromString("packed");
    return self->packed_name ? 0 : -1;
}

/* Fill a slot from a template's bytes and what differs from call to call. 1: published, 0: the queue is full, -1: an error is set. */
static int write_submission(End *self, PyObject *packed, PyObject *const *arguments)
{
    uint64_t call_id, deadline_ns, submitted_ns;
    if (!as_u64(arguments[1], &call_id) || !as_u64(arguments[2], &deadline_ns) || !as_u64(arguments[3], &submitted_ns))
        return -1;
    size_t packed_bytes = (size_t)PyBytes_GET_SIZE(packed);
    size_t tensors = (size_t)PyList_GET_SIZE(arguments[4]);
    if (tensors > SHMBROKER_MAX_TENSORS || PyList_GET_SIZE(arguments[5]) != (Py_ssize_t)tensors
        || packed_bytes > sizeof(Submission) - SEQUENCE_BYTES
        || packed_bytes < offsetof(Submission, tensors) + tensors * sizeof(Descriptor) - SEQUENCE_BYTES) {
        PyErr_Format(PyExc_ValueError, "%zu offsets and %zd generations do not go with a template of %zu bytes", tensors,
                     PyList_GET_SIZE(arguments[5]), packed_bytes);
        return -1;
    }
    uint64_t offsets[SHMBROKER_MAX_TENSORS], generations[SHMBROKER_MAX_TENSORS];
    for (size_t i = 0; i < tensors; i++)
        if (!as_u64(PyList_GET_ITEM(arguments[4], i), &offsets[i]) || !as_u64(PyList_GET_ITEM(arguments[5], i), &generations[i]))
            return -1;
    uint8_t *slot = claim(self);
    if (slot == NULL)
        return 0;
    memcpy(slot + SEQUENCE_BYTES, PyBytes_AS_STRING(packed), packed_bytes);
    Submission *frame = (Submission *)slot;
    frame->call_id = call_id;
    frame->deadline_ns = deadline_ns;
    frame->submitted_ns = submitted_ns;
    for (size_t i = 0; i < tensors; i++) {
        frame->tensors[i].offset = offsets[i];
        frame->generations[i] = (uint32_t)generations[i];
    }
    return commit(self, slot) ? 1 : -1;
}

/* submit(template, call_id, deadline_ns, submitted_ns, offsets, generations) -> bool */
static PyObject *submission_sender_submit(End *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 6 || !PyList_Check(arguments[4]) || !PyList_Check(arguments[5])) {
        PyErr_SetString(PyExc_TypeError, "submit(template, call_id, deadline_ns, submitted_ns, offsets: list, generations: list)");
        return NULL;
    }
    PyObject *packed = PyObject_GetAttr(arguments[0], self->packed_name);
    if (packed == NULL)
        return NULL;
    int written = -1;
    if (PyBytes_Check(packed))
        written = write_submission(self, packed, arguments);
    else
        PyErr_SetString(PyExc_TypeError, "a template's packed is bytes");
    Py_DECREF(packed);
    return written < 0 ? NULL : PyBool_FromLong(written);
}

/* --- SubmissionReceiver ----------------------------------------------------------------------------------------------------------------- */

static int submission_receiver_init(End *self, PyObject *arguments, PyObject *keywords)
{
    return init_receiver(self, arguments, keywords, sizeof(Submission));
}

/* The frame's constant part, as the very object that was given for the same bytes before where there is one: its hash is known. */
static PyObject *key_of(End *self, const Submission *frame)
{
    const char *start = (const char *)&frame->op_id;
    unsigned tensors = (frame->input_count & 0xff) + (frame->output_count & 0xff);
    if (tensors > SHMBROKER_MAX_TENSORS)
        tensors = SHMBROKER_MAX_TENSORS;
    Py_ssize_t nbytes = (const char *)&frame->tensors[tensors] - start;
    uint64_t mixed = frame->op_id;
    for (unsigned i = 0; i < tensors; i++)
        mixed = (mixed ^ frame->tensors[i].offset) * 0x9e3779b97f4a7c15u;
    PyObject **known = &self->keys[mixed >> 32 & (KEYS - 1)];
    if (*known != NULL && PyBytes_GET_SIZE(*known) == nbytes && memcmp(PyBytes_AS_STRING(*known), start, (size_t)nbytes) == 0)
        return Py_NewRef(*known);
    PyObject *key = PyBytes_FromStringAndSize(start, nbytes);
    if (key != NULL)
        Py_XSETREF(*known, Py_NewRef(key));
    return key;
}

/* take() -> (call_id, deadline_ns, submitted_ns, key, frame) | None */
static PyObject *submission_receiver_take(End *self, PyObject *Py_UNUSED(ignored))
{
    if (!is_ready(self))
        Py_RETURN_NONE;
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)slot_of(self, self->position), sizeof(Submission));
    if (bytes == NULL)
        return NULL; /* nothing is taken: the frame is still there */
    Submission *frame = (Submission *)PyBytes_AS_STRING(bytes);
    PyObject *key = key_of(self, frame);
    PyObject *taken = key ? Py_BuildValue("KKKNN", frame->call_id, frame->deadline_ns, frame->submitted_ns, key, bytes) : NULL;
    if (taken == NULL) {
        if (key == NULL)
            Py_DECREF(bytes);
        return NULL;
    }
    advance(self);
    return taken;
}

/* --- CompletionSender ------------------------------------------------------------------------------------------------------------------- */

static int completion_sender_init(End *self, PyObject *arguments, PyObject *keywords)
{
    return init_sender(self, arguments, keywords, sizeof(Completion));
}

/* complete(completion) -> bool, the completion as (call_id, status, queued_ns, compute_ns, body) */
static PyObject *completion_sender_complete(End *self, PyObject *completion)
{
    uint64_t call_id, status, queued_ns, compute_ns;
    if (!PyTuple_Check(completion) || PyTuple_GET_SIZE(completion) != 5 || !PyBytes_Check(PyTuple_GET_ITEM(completion, 4))) {
        PyErr_SetString(PyExc_TypeError, "complete((call_id, status, queued_ns, compute_ns, body: bytes))");
        return NULL;
    }
    if (!as_u64(PyTuple_GET_ITEM(completion, 0), &call_id) || !as_u64(PyTuple_GET_ITEM(completion, 1), &status)
        || !as_u64(PyTuple_GET_ITEM(completion, 2), &queued_ns) || !as_u64(PyTuple_GET_ITEM(completion, 3), &compute_ns))
        return NULL;
    PyObject *body = PyTuple_GET_ITEM(completion, 4);
    if (PyBytes_GET_SIZE(body) > SHMBROKER_TEXT_BYTES) {
        PyErr_Format(PyExc_ValueError, "a text of %zd bytes; a completion carries at most %d", PyBytes_GET_SIZE(body), SHMBROKER_TEXT_BYTES);
        return NULL;
    }
    uint8_t *slot = claim(self);
    if (slot == NULL)
        Py_RETURN_FALSE;
    Completion *frame = (Completion *)slot;
    frame->call_id = call_id;
    frame->status = (uint32_t)status;
    frame->reserved0 = 0;
    frame->text_bytes = (uint32_t)PyBytes_GET_SIZE(body);
    frame->reserved1 = 0;
    frame->queued_ns = queued_ns;
    frame->compute_ns = compute_ns;
    memcpy(frame->body, PyBytes_AS_STRING(body), (size_t)PyBytes_GET_SIZE(body));
    if (!commit(self, slot))
        return NULL;
    Py_RETURN_TRUE;
}

/* --- CompletionReceiver ----------------------------------------------------------------------------------------------------------------- */

static int completion_receiver_init(End *self, PyObject *arguments, PyObject *keywords)
{
    return init_receiver(self, arguments, keywords, sizeof(Completion));
}

/* take() -> (call_id, status, queued_ns, compute_ns, body) | None; those that cannot be a completion are passed over, a queue full of them at
 * most: a peer could go on for ever */
static PyObject *completion_receiver_take(End *self, PyObject *Py_UNUSED(ignored))
{
    for (uint64_t passed = 0; passed <= self->mask && is_ready(self); passed++) {
        const Completion *slot = (const Completion *)slot_of(self, self->position);
        Completion frame;
        memcpy(&frame, slot, offsetof(Completion, body));
        bool possible = frame.text_bytes <= SHMBROKER_TEXT_BYTES;
        if (possible && frame.text_bytes)
            memcpy(frame.body, slot->body, frame.text_bytes);
        PyObject *taken = NULL;
        if (possible) {
            taken = Py_BuildValue("KkKKy#", frame.call_id, (unsigned long)frame.status, frame.queued_ns, frame.compute_ns,
                                  (const char *)frame.body, (Py_ssize_t)frame.text_bytes);
            if (taken == NULL)
                return NULL;
        }
        advance(self);
        if (possible)
            return taken;
    }
    Py_RETURN_NONE;
}

/* --- types ------------------------------------------------------------------------------------------------------------------------------ */

#define METHOD(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef submission_sender_methods[] = {
    {"nudge", METHOD(sender_nudge), METH_NOARGS, "Wake the peer if it sleeps: a frame will follow in a moment."},
    {"submit", METHOD(submission_sender_submit), METH_FASTCALL, "Write a frame and publish it; False while the queue is full."},
    {NULL},
};
static PyMethodDef submission_receiver_methods[] = {
    {"take", METHOD(submission_receiver_take), METH_NOARGS, "The next call, or None."},
    {"ready", METHOD(receiver_ready), METH_NOARGS, "Whether a frame is published and not yet taken."},
    {NULL},
};
static PyMethodDef completion_sender_methods[] = {
    {"complete", METHOD(completion_sender_complete), METH_O, "Write a completion and publish it; False while the queue is full."},
    {NULL},
};
static PyMethodDef completion_receiver_methods[] = {
    {"take", METHOD(completion_receiver_take), METH_NOARGS, "The next completion, or None."},
    {"ready", METHOD(receiver_ready), METH_NOARGS, "Whether a frame is published and not yet taken."},
    {NULL},
};

#define END_TYPE(type_name, prefix, documentation)                                                                                              \
    static PyType_Slot prefix##_slots[] = {                                                                                                \
        {Py_tp_doc, documentation},                                                                                                        \
        {Py_tp_new, PyType_GenericNew},                                                                                                    \
        {Py_tp_init, prefix##_init},                                                                                                       \
        {Py_tp_dealloc, end_dealloc},                                                                                                      \
        {Py_tp_methods, prefix##_methods},                                                                                                 \
        {0, NULL},                                                                                                                         \
    };                                                                                                                                     \
    static PyType_Spec prefix##_spec = {                                                                                                   \
        .name = "shmbroker.lane._ends." type_name,                                                                                              \
        .basicsize = sizeof(End),                                                                                                          \
        .flags = Py_TPFLAGS_DEFAULT,                                                                                                       \
        .slots = prefix##_slots,                                                                                                           \
    };

END_TYPE("SubmissionSender", submission_sender, "The client's end of the submission queue. Not thread-safe.")
END_TYPE("SubmissionReceiver", submission_receiver, "The worker's end of the submission queue. Not thread-safe.")
END_TYPE("CompletionSender", completion_sender, "The worker's end of the completion queue. Not thread-safe.")
END_TYPE("CompletionReceiver", completion_receiver, "The client's end of the completion queue. Not thread-safe.")

typedef struct {
    PyTypeObject *submission_receiver, *completion_receiver;
} State;

/* --- spin ------------------------------------------------------------------------------------------------------------------------------- */

static bool is_receiver(const State *state, PyObject *object)
{
    return Py_IS_TYPE(object, state->submission_receiver) || Py_IS_TYPE(object, state->completion_receiver);
}

/* spin(receivers, seconds) -> bool. The interpreter lock is let go meanwhile: other threads of a process that waits can work. */
static PyObject *spin(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    enum { MOST = 64 };
    const State *state = PyModule_GetState(module);
    if (count != 2 || !PyTuple_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "spin(receivers: tuple, seconds: float)");
        return NULL;
    }
    double seconds = PyFloat_AsDouble(arguments[1]);
    if (seconds == -1.0 && PyErr_Occurred())
        return NULL;
    Py_ssize_t watched = PyTuple_GET_SIZE(arguments[0]);
    const End *ends[MOST];
    if (watched > MOST)
        watched = MOST; /* whoever is not looked at here is looked at before sleeping */
    for (Py_ssize_t i = 0; i < watched; i++) {
        PyObject *end = PyTuple_GET_ITEM(arguments[0], i);
        if (!is_receiver(state, end)) {
            PyErr_SetString(PyExc_TypeError, "spin takes the receivers of this module");
            return NULL;
        }
        ends[i] = (const End *)end;
    }
    bool found = false;
    Py_INCREF(arguments[0]);
    Py_BEGIN_ALLOW_THREADS
    uint64_t now = clock_ns(), impolite_until = now + IMPOLITE_NS;
    uint64_t until = now + (seconds > 0 ? (uint64_t)(seconds < 1 ? seconds * 1e9 : 1e9) : 0);
    do {
        if (now > impolite_until)
            sched_yield();
        for (int look = 0; look < LOOKS_FOR_EACH_CLOCK && !found; look++) {
            for (Py_ssize_t i = 0; i < watched && !found; i++)
                found = is_ready(ends[i]);
            if (!found)
                relax();
        }
        now = clock_ns();
    } while (!found && now < until);
    Py_END_ALLOW_THREADS
    Py_DECREF(arguments[0]);
    return PyBool_FromLong(found);
}

/* --- module ----------------------------------------------------------------------------------------------------------------------------- */

static int module_exec(PyObject *module)
{
    State *state = PyModule_GetState(module);
    PyType_Spec *specs[] = {&submission_sender_spec, &submission_receiver_spec, &completion_sender_spec, &completion_receiver_spec};
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        PyObject *type = PyType_FromModuleAndSpec(module, specs[i], NULL);
        if (type == NULL || PyModule_AddType(module, (PyTypeObject *)type) < 0) {
            Py_XDECREF(type);
            return -1;
        }
        if (specs[i] == &submission_receiver_spec)
            state->submission_receiver = (PyTypeObject *)Py_NewRef(type);
        else if (specs[i] == &completion_receiver_spec)
            state->completion_receiver = (PyTypeObject *)Py_NewRef(type);
        Py_DECREF(type);
    }
    return PyModule_AddIntConstant(module, "LAYOUT_VERSION", SHMBROKER_LAYOUT_VERSION);
}

static int module_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->submission_receiver);
    Py_CLEAR(state->completion_receiver);
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->submission_receiver);
    Py_VISIT(state->completion_receiver);
    return 0;
}

static PyMethodDef module_methods[] = {
    {"spin", METHOD(spin), METH_FASTCALL, "Look for a frame at any of the receivers for so long; whether there is one."},
    {NULL},
};
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmbroker.lane._ends",
    .m_doc = "The ends of the queues, compiled. Used through shmbroker.lane.ends.",
    .m_size = sizeof(State),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__ends(void)
{
    return PyModuleDef_Init(&module_def);
}
