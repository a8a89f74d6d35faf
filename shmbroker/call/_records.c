/* The records that calls are kept and counted in: as shmbroker/call/python_records.py has them, with plain words for numbers. */

#include "_calls.h"

/* --- CallRecord --------------------------------------------------------------------------------------------------------------------------- */

static void let_go_of_blocks(CallRecord *self)
{
    while (self->copy_count > 0)
        known.lease->give_up(self->copies[--self->copy_count]);
    while (self->held_count > 0) {
        PyObject *hold = self->held[--self->held_count];
        Py_DECREF(hold);
    }
}

static int record_clear(CallRecord *self)
{
    Py_CLEAR(self->plan);
    Py_CLEAR(self->inputs);
    Py_CLEAR(self->outputs);
    Py_CLEAR(self->holds);
    Py_CLEAR(self->state);
    Py_CLEAR(self->error);
    Py_CLEAR(self->wake);
    Py_CLEAR(self->future);
    Py_CLEAR(self->back);
    let_go_of_blocks(self);
    return 0;
}

void clear_record(CallRecord *record)
{
    record_clear(record);
    record->copied_bytes = record->copy_ns = 0;
}

static int record_traverse(CallRecord *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->plan);
    Py_VISIT(self->inputs);
    Py_VISIT(self->outputs);
    Py_VISIT(self->holds);
    Py_VISIT(self->state);
    Py_VISIT(self->error);
    Py_VISIT(self->wake);
    Py_VISIT(self->future);
    Py_VISIT(self->back);
    for (int i = 0; i < self->held_count; i++)
        Py_VISIT(self->held[i]);
    return 0;
}

static void record_dealloc(CallRecord *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    record_clear(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *record_holds(CallRecord *self, void *Py_UNUSED(closure))
{
    if (self->held_count == 0) {
        if (self->holds != NULL)
            return Py_NewRef(self->holds);
        PyErr_SetString(PyExc_AttributeError, "holds");
        return NULL;
    }
    PyObject *holds = PyTuple_New(self->held_count);
    for (int i = 0; holds != NULL && i < self->held_count; i++)
        PyTuple_SET_ITEM(holds, i, Py_NewRef(self->held[i]));
    return holds;
}

static int record_set_holds(CallRecord *self, PyObject *holds, void *Py_UNUSED(closure))
{
    Py_XSETREF(self->holds, Py_XNewRef(holds));
    let_go_of_blocks(self);
    return 0;
}

#define OBJECT(name) {#name, T_OBJECT_EX, offsetof(CallRecord, name), 0, NULL}
#define WORD(name) {#name, T_ULONGLONG, offsetof(CallRecord, name), 0, NULL}
static PyMemberDef record_members[] = {
    OBJECT(plan),
    OBJECT(inputs),
    OBJECT(outputs),
    OBJECT(state),
    OBJECT(error),
    OBJECT(wake),
    OBJECT(future),
    OBJECT(back),
    WORD(begun_ns),
    WORD(deadline_ns),
    WORD(submitted_ns),
    WORD(call_id),
    WORD(copied_bytes),
    WORD(copy_ns),
    {NULL},
};
#undef OBJECT
#undef WORD

static PyGetSetDef record_attributes[] = {
    {"holds", (getter)record_holds, (setter)record_set_holds, NULL, NULL},
    {NULL},
};
static PyType_Slot record_slots[] = {
    {Py_tp_doc, "What is kept of a call while it is outstanding."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, record_dealloc},
    {Py_tp_traverse, record_traverse},
    {Py_tp_clear, record_clear},
    {Py_tp_members, record_members},
    {Py_tp_getset, record_attributes},
    {0, NULL},
};
PyType_Spec call_record_spec = {
    .name = "shmbroker.call._calls.CallRecord",
    .basicsize = sizeof(CallRecord),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = record_slots,
};

/* --- Counters ----------------------------------------------------------------------------------------------------------------------------- */

#define WORD(name) {#name, T_LONGLONG, offsetof(Counters, name), 0, NULL}
static PyMemberDef counters_members[] = {
    WORD(calls),
    WORD(errors),
    WORD(rpc_ns),
    WORD(compute_ns),
    WORD(queued_ns),
    WORD(copy_ns),
    WORD(build_ns),
    WORD(read_ns),
    WORD(sent_bytes),
    WORD(received_bytes),
    WORD(copied_bytes),
    {NULL},
};
#undef WORD

static void counters_dealloc(PyObject *self)
{
    free_object(self);
}

static PyType_Slot counters_slots[] = {
    {Py_tp_doc, "Counters of one bound op."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, counters_dealloc},
    {Py_tp_members, counters_members},
    {0, NULL},
};
PyType_Spec counters_spec = {
    .name = "shmbroker.call._calls.Counters",
    .basicsize = sizeof(Counters),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = counters_slots,
};
