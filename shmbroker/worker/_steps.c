/* Taking, running and completing calls, compiled: what FrameLoop._run_one_each does, for the ordinary one of them; anything else is left to it.
 *
 * Ordinary is a call whose frame was met before, byte for byte, in time, while nobody else wants the device; and whose op returns nothing, raises
 * nothing, and leaves its inputs as they were. What makes it so before the op runs is looked at while the frame is still there; where anything is
 * otherwise the frame is left there. What comes after is told by the channel's own functions.
 *
 *   Who      The frame thread, with the interpreter lock.
 *   After    run: looks at all lanes until nothing has come for a while, an extraordinary call has, or its time is over.
 *   Failure  Nothing is raised for what a client or an op does. What the channel's functions raise, and what a ring raises, is passed on.
 */

#include "../lane/_ends.h"
#include "../lane/_keys.h"
#include "../memory/_slots.h"

typedef struct shmbroker_submission_frame Submission;

enum { LOOKS_FOR_EACH_CLOCK = 16 }; /* a look costs a few ns, the clock some 25 */

/* Told once by set_up(). */
static struct {
    PyTypeObject *submission_receiver, *completion_sender;
    PyGetSetDef *version;
    PyObject *storage_uses;
    struct {
        Py_ssize_t prepared; /* WorkerChannel */
        Py_ssize_t run, watched; /* PreparedCall */
    } at;
} known;

/* --- Counters: ChannelCounters of channel.py, as plain words ---------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    unsigned long long calls, errors, compute_ns, queued_ns, batched, batched_with;
} Counters;

static inline void add_saturated(unsigned long long *word, unsigned long long more)
{
    if (__builtin_add_overflow(*word, more, word))
        *word = UINT64_MAX;
}

static PyObject *counters_queued_ns(Counters *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(self->queued_ns);
}

/* What a client claims makes no number that has no room: the largest stands for any beyond. */
static int counters_set_queued_ns(Counters *self, PyObject *number, void *Py_UNUSED(closure))
{
    if (number == NULL || !PyLong_Check(number)) {
        PyErr_SetString(PyExc_TypeError, "queued_ns is a number");
        return -1;
    }
    unsigned long long value = PyLong_AsUnsignedLongLong(number);
    if (value == UINT64_MAX && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return -1;
        PyErr_Clear();
    }
    self->queued_ns = value;
    return 0;
}

#define WORD(name) {#name, T_ULONGLONG, offsetof(Counters, name), 0, NULL}
static PyMemberDef counters_members[] = {WORD(calls), WORD(errors), WORD(compute_ns), WORD(batched), WORD(batched_with), {NULL}};
#undef WORD
static PyGetSetDef counters_attributes[] = {{"queued_ns", (getter)counters_queued_ns, (setter)counters_set_queued_ns, NULL, NULL}, {NULL}};
static PyType_Slot counters_slots[] = {
    {Py_tp_doc, "What a channel has done."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, free_object},
    {Py_tp_members, counters_members},
    {Py_tp_getset, counters_attributes},
    {0, NULL},
};
static PyType_Spec counters_spec = {
    .name = "shmbroker.worker._steps.Counters",
    .basicsize = sizeof(Counters),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = counters_slots,
};

/* --- Watched: the inputs of a prepared call, as PreparedCall.changed looks at them ----------------------------------------------------------- */

typedef struct {
    PyObject *tensor, *storage; /* borrowed of the tuples, the second as a number */
    Py_ssize_t references;
    long version, uses;
} WatchedInput;

typedef struct {
    PyObject_HEAD
    PyObject *tensors, *storages;
    int count;
    WatchedInput inputs[SHMBROKER_MAX_TENSORS];
} Watched;

static inline bool read_number(PyObject *number, long *value)
{
    if (number == NULL)
        return false;
    *value = PyLong_AsLong(number);
    Py_DECREF(number);
    return !(*value == -1 && PyErr_Occurred());
}

static inline bool look_at(const WatchedInput *input, long *version, long *uses)
{
    return read_number(known.version->get(input->tensor, known.version->closure), version)
           && read_number(PyObject_CallOneArg(known.storage_uses, input->storage), uses);
}

/* Watched(tensors: tuple, storages: tuple of int) */
static int watched_init(Watched *self, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"tensors", "storages", NULL};
    PyObject *tensors, *storages;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!O!", names, &PyTuple_Type, &tensors, &PyTuple_Type, &storages))
        return -1;
    if (self->tensors != NULL || PyTuple_GET_SIZE(tensors) != PyTuple_GET_SIZE(storages) || PyTuple_GET_SIZE(tensors) > SHMBROKER_MAX_TENSORS) {
        PyErr_SetString(PyExc_ValueError, "Watched are made once, with a storage for each of at most 12 tensors");
        return -1;
    }
    self->tensors = Py_NewRef(tensors);
    self->storages = Py_NewRef(storages);
    self->count = (int)PyTuple_GET_SIZE(tensors);
    for (int i = 0; i < self->count; i++) {
        WatchedInput *input = &self->inputs[i];
        input->tensor = PyTuple_GET_ITEM(tensors, i);
        input->storage = PyTuple_GET_ITEM(storages, i);
        if (!look_at(input, &input->version, &input->uses))
            return -1;
        input->references = Py_REFCNT(input->tensor);
    }
    return 0;
}

static int watched_traverse(Watched *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->tensors);
    return 0;
}

static void watched_dealloc(Watched *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_CLEAR(self->tensors);
    Py_CLEAR(self->storages);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* Whether an input is not as it was noted. An error in looking is a change: whoever looks closer meets it again. */
static bool has_changed(const Watched *self)
{
    for (int i = 0; i < self->count; i++) {
        long version, uses;
        if (!look_at(&self->inputs[i], &version, &uses)) {
            PyErr_Clear();
            return true;
        }
        if (version != self->inputs[i].version || uses != self->inputs[i].uses || Py_REFCNT(self->inputs[i].tensor) != self->inputs[i].references)
            return true;
    }
    return false;
}

static PyObject *watched_changed(Watched *self, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(has_changed(self));
}

static PyMethodDef watched_methods[] = {
    {"changed", METHOD(watched_changed), METH_NOARGS, "Whether an input is not as it was when this was made."},
    {NULL},
};
static PyType_Slot watched_slots[] = {
    {Py_tp_doc, "The inputs of a prepared call, as they were while no op had them."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, watched_init},
    {Py_tp_dealloc, watched_dealloc},
    {Py_tp_traverse, watched_traverse},
    {Py_tp_methods, watched_methods},
    {0, NULL},
};
static PyType_Spec watched_spec = {
    .name = "shmbroker.worker._steps.Watched",
    .basicsize = sizeof(Watched),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = watched_slots,
};

/* --- Bound: a function with its arguments, to be called again and again without packing them anew ------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *function, *names; /* of the keywords, or NULL */
    Py_ssize_t positional, count;
    PyObject **arguments; /* NULL: never made */
} Bound;

static PyObject *bound_vectorcall(PyObject *object, PyObject *const *Py_UNUSED(arguments), size_t count, PyObject *names)
{
    Bound *self = (Bound *)object;
    if (PyVectorcall_NARGS(count) || (names != NULL && PyTuple_GET_SIZE(names)) || self->arguments == NULL) {
        PyErr_SetString(PyExc_TypeError, "a Bound is called with nothing");
        return NULL;
    }
    return PyObject_Vectorcall(self->function, self->arguments, (size_t)self->positional, self->names);
}

/* Bound(function, arguments: tuple, keywords: dict) */
static int bound_init(Bound *self, PyObject *arguments, PyObject *Py_UNUSED(keywords))
{
    PyObject *function, *positional, *named;
    if (!PyArg_ParseTuple(arguments, "OO!O!", &function, &PyTuple_Type, &positional, &PyDict_Type, &named))
        return -1;
    if (self->arguments != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "a Bound is made once");
        return -1;
    }
    Py_ssize_t count = PyTuple_GET_SIZE(positional) + PyDict_GET_SIZE(named);
    PyObject *names = PyDict_GET_SIZE(named) ? PySequence_Tuple(named) : NULL;
    PyObject **all = PyMem_Calloc((size_t)count + 1, sizeof *all);
    if (all == NULL || (names == NULL && PyDict_GET_SIZE(named))) {
        PyMem_Free(all);
        Py_XDECREF(names);
        if (!PyErr_Occurred())
            PyErr_NoMemory();
        return -1;
    }
    self->positional = PyTuple_GET_SIZE(positional);
    for (Py_ssize_t i = 0; i < count; i++) {
        bool by_name = i >= self->positional;
        PyObject *one = by_name ? PyDict_GetItem(named, PyTuple_GET_ITEM(names, i - self->positional)) : PyTuple_GET_ITEM(positional, i);
        all[i] = Py_NewRef(one);
    }
    self->function = Py_NewRef(function);
    self->names = names;
    self->count = count;
    self->arguments = all;
    self->vectorcall = bound_vectorcall;
    return 0;
}

static int bound_traverse(Bound *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->function);
    for (Py_ssize_t i = 0; i < self->count; i++)
        Py_VISIT(self->arguments[i]);
    return 0;
}

static int bound_clear(Bound *self)
{
    PyObject **arguments = self->arguments;
    Py_ssize_t count = self->count;
    self->arguments = NULL;
    self->count = 0;
    Py_CLEAR(self->function);
    Py_CLEAR(self->names);
    for (Py_ssize_t i = 0; i < count; i++)
        Py_DECREF(arguments[i]);
    PyMem_Free(arguments);
    return 0;
}

static void bound_dealloc(Bound *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    bound_clear(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMemberDef bound_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Bound, vectorcall), READONLY, NULL},
    {NULL},
};
static PyType_Slot bound_slots[] = {
    {Py_tp_doc, "A function with its arguments."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, bound_init},
    {Py_tp_dealloc, bound_dealloc},
    {Py_tp_traverse, bound_traverse},
    {Py_tp_clear, bound_clear},
    {Py_tp_members, bound_members},
    {Py_tp_call, PyVectorcall_Call},
    {0, NULL},
};
static PyType_Spec bound_spec = {
    .name = "shmbroker.worker._steps.Bound",
    .basicsize = sizeof(Bound),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = bound_slots,
};

/* --- Step: one lane -------------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *receiver, *sender; /* of the lane */
    PyObject *channel, *counters;
    PyObject *wanting; /* Turns.waiting */
    PyObject *acquire, *release, *give_back;
    PyObject *ended, *failed; /* what the channel makes of a call that was not ordinary after all */
    PyObject *complete;       /* complete(completion): of such a one */
    PyObject *overfull;       /* overfull(): the client has left its queue full */
    PyTypeObject *watched;
    Keys keys;
} Step;

/* Step(channel, counters, receiver, sender, waiting, acquire, release, give_back, ended, failed, complete, overfull) */
static int step_init(Step *self, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"channel", "counters", "receiver", "sender",   "waiting",  "acquire", "release",
                            "give_back", "ended",  "failed",   "complete", "overfull", NULL};
    PyObject *parts[12];
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOO!O!O!OOOOOOO", names, &parts[0], &parts[1], known.submission_receiver, &parts[2],
                                     known.completion_sender, &parts[3], &PyDict_Type, &parts[4], &parts[5], &parts[6], &parts[7], &parts[8],
                                     &parts[9], &parts[10], &parts[11]))
        return -1;
    if (self->channel != NULL || !is_made(&((AnyReceiver *)parts[2])->receiver.queue) || !is_made(&((AnySender *)parts[3])->sender.queue)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "a Step is made once");
        return -1;
    }
    PyObject **places[] = {&self->channel,   &self->counters, &self->receiver, &self->sender,   &self->wanting,  &self->acquire,
                           &self->release,   &self->give_back, &self->ended,   &self->failed, &self->complete, &self->overfull};
    for (int i = 0; i < 12; i++)
        *places[i] = Py_NewRef(parts[i]);
    return 0;
}

static int step_traverse(Step *self, visitproc visit, void *arg)
{
    PyObject *all[] = {self->channel, self->counters, self->ended, self->failed, self->complete, self->overfull, self->give_back};
    Py_VISIT(Py_TYPE(self));
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        Py_VISIT(all[i]);
    return 0;
}

static int step_clear(Step *self)
{
    Py_CLEAR(self->channel);
    Py_CLEAR(self->counters);
    Py_CLEAR(self->receiver);
    Py_CLEAR(self->sender);
    Py_CLEAR(self->wanting);
    Py_CLEAR(self->acquire);
    Py_CLEAR(self->release);
    Py_CLEAR(self->give_back);
    Py_CLEAR(self->ended);
    Py_CLEAR(self->failed);
    Py_CLEAR(self->complete);
    Py_CLEAR(self->overfull);
    forget_keys(&self->keys);
    return 0;
}

static void step_dealloc(Step *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    step_clear(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyType_Slot step_slots[] = {
    {Py_tp_doc, "What running one lane's calls needs."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, step_init},
    {Py_tp_dealloc, step_dealloc},
    {Py_tp_traverse, step_traverse},
    {Py_tp_clear, step_clear},
    {0, NULL},
};
static PyType_Spec step_spec = {
    .name = "shmbroker.worker._steps.Step",
    .basicsize = sizeof(Step),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = step_slots,
};

/* --- one call ------------------------------------------------------------------------------------------------------------------------------- */

typedef enum { FAILED = -1, NOTHING, RAN, EXTRAORDINARY } Outcome;

static bool take_device(const Step *self)
{
    if (PyDict_GET_SIZE(self->wanting))
        return false;
    PyObject *taken = PyObject_CallOneArg(self->acquire, Py_False);
    Py_XDECREF(taken);
    return taken == Py_True;
}

/* False: an error is set. One that was set before stays. */
static bool give_device_back(const Step *self)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *given = PyObject_CallNoArgs(PyDict_GET_SIZE(self->wanting) ? self->give_back : self->release);
    Py_XDECREF(given);
    if (given == NULL) {
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(traceback);
        return false;
    }
    PyErr_Restore(type, error, traceback);
    return true;
}

/* The error that is set, with its traceback, as an object; nothing is set then. */
static PyObject *error_object(void)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(error, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return error;
}

/* Publish that a call was run, in so many nanoseconds. */
static Outcome complete(Step *self, uint64_t call_id, uint64_t queued_ns, uint64_t compute_ns)
{
    Sender *sender = &((AnySender *)self->sender)->sender;
    uint8_t *slot = shmbroker_claim(&sender->queue);
    if (slot == NULL) {
        PyObject *told = PyObject_CallNoArgs(self->overfull);
        Py_XDECREF(told);
        return told == NULL ? FAILED : RAN;
    }
    shmbroker_fill_completion(slot, call_id, 0, queued_ns, compute_ns, NULL, 0);
    return commit(sender, slot) ? RAN : FAILED;
}

/* Publish what the channel makes of a call. Takes over the completion. */
static Outcome complete_with(Step *self, PyObject *completion)
{
    PyObject *done = completion == NULL ? NULL : PyObject_CallOneArg(self->complete, completion);
    Py_XDECREF(completion);
    if (done == Py_False) {
        Py_DECREF(done);
        done = PyObject_CallNoArgs(self->overfull);
    }
    Py_XDECREF(done);
    return done == NULL ? FAILED : RAN;
}

/* Run the next call of a lane, where it is ordinary. */
static Outcome run_one(Step *self)
{
    Receiver *receiver = &((AnyReceiver *)self->receiver)->receiver;
    const uint8_t *slot = shmbroker_peek(&receiver->queue);
    if (slot == NULL)
        return NOTHING;
    unsigned long long taken_ns = clock_ns();
    Submission frame;
    shmbroker_copy_constant(slot, &frame);
    PyObject *key = key_of(&self->keys, &frame);
    PyObject *prepared = key == NULL ? NULL : PyDict_GetItemWithError(in_slot(self->channel, known.at.prepared), key);
    PyObject *watched = prepared == NULL ? NULL : in_slot(prepared, known.at.watched);
    Py_XINCREF(prepared);
    if (watched == NULL || watched == Py_None || (frame.deadline_ns && taken_ns > frame.deadline_ns) || !take_device(self)) {
        PyErr_Clear();
        Py_XDECREF(prepared);
        Py_XDECREF(key);
        return EXTRAORDINARY;
    }
    shmbroker_advance(&receiver->queue);
    Counters *counters = (Counters *)self->counters;
    unsigned long long queued_ns = taken_ns > frame.submitted_ns ? taken_ns - frame.submitted_ns : 0;
    counters->calls += 1;
    add_saturated(&counters->queued_ns, queued_ns);
    PyObject *launched = PyObject_CallNoArgs(in_slot(prepared, known.at.run));
    PyObject *completion = NULL, *error = launched == NULL ? error_object() : NULL;
    unsigned long long compute_ns = clock_ns() - taken_ns;
    bool ordinary = false;
    if (error != NULL) {
        completion = PyObject_CallFunction(self->failed, "KOKKO", (unsigned long long)frame.call_id, key, queued_ns, taken_ns, error);
        Py_DECREF(error);
    } else {
        counters->compute_ns += compute_ns;
        Py_DECREF(launched); /* an op may return an input */
        ordinary = !has_changed((Watched *)watched);
        if (!ordinary)
            completion = PyObject_CallFunction(self->ended, "KOKKKO", (unsigned long long)frame.call_id, key, queued_ns, taken_ns, compute_ns, prepared);
    }
    Py_DECREF(prepared);
    Py_DECREF(key);
    if (!give_device_back(self)) {
        Py_XDECREF(completion);
        return FAILED;
    }
    return ordinary ? complete(self, frame.call_id, queued_ns, compute_ns) : complete_with(self, completion);
}

/* run(steps, look_ns, most_ns) -> int: how many calls were run; 0 also where an extraordinary one waits, whose turn it is next */
static PyObject *run(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    unsigned long long look_ns, most_ns;
    if (count != 3 || !PyTuple_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "run(steps: tuple, look_ns, most_ns)");
        return NULL;
    }
    if (!as_unsigned(arguments[1], UINT64_MAX, "look_ns", (uint64_t *)&look_ns)
        || !as_unsigned(arguments[2], UINT64_MAX, "most_ns", (uint64_t *)&most_ns))
        return NULL;
    PyObject *steps = arguments[0];
    unsigned long long begun_ns = clock_ns(), last_ns = begun_ns, now_ns = begun_ns;
    long calls = 0;
    bool extraordinary = false;
    do {
        for (int look = 0; look < LOOKS_FOR_EACH_CLOCK && !extraordinary; look++) {
            bool ran = false;
            for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(steps); i++) {
                Outcome outcome = run_one((Step *)PyTuple_GET_ITEM(steps, i));
                if (outcome == FAILED)
                    return NULL;
                if (outcome == RAN) {
                    ran = true;
                    calls += 1;
                }
                extraordinary = extraordinary || outcome == EXTRAORDINARY;
            }
            if (ran) {
                last_ns = 0; /* since the clock is looked at next */
                break;
            }
            relax();
        }
        now_ns = clock_ns();
        if (last_ns == 0)
            last_ns = now_ns;
    } while (!extraordinary && now_ns - begun_ns < most_ns && now_ns - last_ns < look_ns);
    return PyLong_FromLong(extraordinary ? 0 : calls);
}

/* --- module ----------------------------------------------------------------------------------------------------------------------------------- */

/* know_tensors(tensor, storage_uses): once, before inputs are watched. TypeError where torch is otherwise. */
static PyObject *know_tensors(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    PyObject *version = count == 2 ? PyObject_GetAttrString(arguments[0], "_version") : NULL;
    bool fits = version != NULL && Py_IS_TYPE(version, &PyGetSetDescr_Type);
    if (fits) {
        known.version = ((PyGetSetDescrObject *)version)->d_getset;
        Py_XSETREF(known.storage_uses, Py_NewRef(arguments[1]));
    }
    Py_XDECREF(version);
    if (fits)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_TypeError, "this torch tells of its tensors otherwise");
    return NULL;
}

/* set_up(channel, prepared, receiver, sender): once. TypeError where something is not as it has to be. */
static PyObject *set_up(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 4 || !PyType_Check(arguments[2]) || !PyType_Check(arguments[3])) {
        PyErr_SetString(PyExc_TypeError, "set_up(channel, prepared, receiver, sender)");
        return NULL;
    }
    known.at.prepared = offset_of_slot(arguments[0], "_prepared");
    known.at.run = offset_of_slot(arguments[1], "run");
    known.at.watched = offset_of_slot(arguments[1], "watched");
    if (known.at.prepared < 0 || known.at.run < 0 || known.at.watched < 0)
        return NULL;
    Py_XSETREF(known.submission_receiver, (PyTypeObject *)Py_NewRef(arguments[2]));
    Py_XSETREF(known.completion_sender, (PyTypeObject *)Py_NewRef(arguments[3]));
    Py_RETURN_NONE;
}

static int module_exec(PyObject *module)
{
    PyType_Spec *specs[] = {&counters_spec, &watched_spec, &bound_spec, &step_spec};
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        PyObject *type = PyType_FromModuleAndSpec(module, specs[i], NULL);
        if (type == NULL || PyModule_AddType(module, (PyTypeObject *)type) < 0) {
            Py_XDECREF(type);
            return -1;
        }
        Py_DECREF(type);
    }
    return 0;
}

static PyMethodDef module_methods[] = {
    {"know_tensors", METHOD(know_tensors), METH_FASTCALL, "Tell how tensors are watched, once."},
    {"set_up", METHOD(set_up), METH_FASTCALL, "Tell the classes that compiled steps work on, once."},
    {"run", METHOD(run), METH_FASTCALL, "Run ordinary calls as they come; how many, or 0 where another one waits."},
    {NULL},
};
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmbroker.worker._steps",
    .m_doc = "Taking, running and completing calls, compiled. Used through shmbroker.worker.compiled_steps.",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__steps(void)
{
    return PyModuleDef_Init(&module_def);
}
