/* What the compiled calls have in common: the records that calls are kept and counted in, and where Python's own objects have what is read. */
#ifndef SHMBROKER_CALLS_H
#define SHMBROKER_CALLS_H

#include "../arena/_leases.h"
#include "../lane/_ends.h"
#include "../memory/_slots.h"

/* CallRecord of python_records.py. Its inputs are held in `inputs`, the holds of its blocks in `holds`, or in `held` where the call was made here. */
typedef struct {
    PyObject_HEAD
    PyObject *plan, *inputs, *outputs, *holds, *state, *error, *wake, *future, *back;
    unsigned long long begun_ns, deadline_ns, submitted_ns, call_id, copied_bytes, copy_ns;
    PyObject *held[SHMBROKER_MAX_TENSORS];
    struct Lease *copies[SHMBROKER_MAX_TENSORS]; /* of the blocks that inputs were copied to, given up with the holds */
    int held_count, copy_count;
} CallRecord;

/* Counters of python_records.py. */
typedef struct {
    PyObject_HEAD
    long long calls, errors, rpc_ns, compute_ns, queued_ns, copy_ns, build_ns, read_ns, sent_bytes, received_bytes, copied_bytes;
} Counters;

/* Told once by set_up(): classes, objects, and offsets of slots. */
typedef struct {
    PyTypeObject *call, *tensor, *leases, *submission_sender, *completion_receiver;
    PyTypeObject *path, *capture; /* of this module */
    PyObject *outstanding, *done;
    PyObject *wait;            /* wait(pair, call) -> result */
    PyObject *op_call, *replay; /* RemoteOp.__call__, CapturedCall.replay */
    PyObject *check_written;   /* check_written(captured): raises where an output lies elsewhere */
    PyObject *is_transformed;  /* whether a tensor is one of torch.func's */
    PyObject *levels;          /* the names of torch.autograd.forward_ad */
    PyObject *nothing;         /* () */
    PyObject *level_name, *append_name, *untyped_storage, *nbytes, *data_ptr; /* names of attributes and methods */
    const LeaseFunctions *lease;
    const DLPackExchange *exchange;
    PyGetSetDef *requires_grad;
    PyMethodDef *is_neg;
    struct {
        Py_ssize_t fast, replay; /* RemoteOp, CapturedCall */
        Py_ssize_t due, lost, outstanding, lane, buckets;
        Py_ssize_t wanted;
        Py_ssize_t busy, idle, idle_count, leases, named, ring, blocks;
        Py_ssize_t placed;
        Py_ssize_t offset, hold, generation, placed_at, nbytes;
        Py_ssize_t rooms, single, template, sent_bytes, received_bytes;
        Py_ssize_t packed;
        Py_ssize_t room_nbytes, form, as_integers;
        Py_ssize_t samples;
    } at;
} Known;

extern Known known;
extern PyType_Spec call_record_spec, counters_spec;

/* Of a record that is done and that nobody else has: nothing of the call is kept. */
void clear_record(CallRecord *record);

#endif
