/* remus_ckpt.codec._native: the table of kernels as Python functions over the buffer protocol.
 *
 * Each function checks what the kernels take for granted (types, lengths, page numbers), raises ValueError, TypeError
 * or BufferError before anything is done, and runs without the GIL. Only the stable ABI of Python 3.11 is used.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <string.h>

#include "kernels.h"

#define CAPSULE "remus_ckpt.codec._native.kernel"

/* What a function is bound to. */
typedef struct {
    const remus_kernel *kernel;
    int codec;
} binding;

static binding bindings[8 * REMUS_CODECS];

static const binding *bound(PyObject *self)
{
    return PyCapsule_GetPointer(self, CAPSULE);
}

static int count_is(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given != wanted)
        PyErr_Format(PyExc_TypeError, "%zd arguments are given where %zd are taken", given, wanted);
    return given == wanted;
}

/* Views of arrays by the type of their items; those of pages end in an axis of 4,096. A view is contiguous, so that its
 * length counts. None leaves it empty, which releasing takes no offence at. */
static int view(PyObject *object, Py_buffer *buffer, const char *formats, int flags, const char *what)
{
    if (object == Py_None)
        return 0;
    if (PyObject_GetBuffer(object, buffer, flags | PyBUF_ND | PyBUF_FORMAT))
        return -1;
    if (buffer->format && buffer->format[0] && !buffer->format[1] && strchr(formats, buffer->format[0]))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must have items of a type among '%s'", what, formats);
    return -1;
}

static int view_pages(PyObject *object, Py_buffer *buffer, int flags, const char *what)
{
    if (object == Py_None) {
        PyErr_Format(PyExc_TypeError, "%s must be pages", what);
        return -1;
    }
    if (view(object, buffer, "B", flags, what))
        return -1;
    if (buffer->ndim > 1 && buffer->shape[buffer->ndim - 1] == REMUS_PAGE)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must be uint8[n, %d]", what, REMUS_PAGE);
    return -1;
}

static int view_numbers(PyObject *object, Py_buffer *buffer, int flags, const char *what)
{
    if (view(object, buffer, "lq", flags, what))
        return -1;
    if (object == Py_None || (buffer->itemsize == 8 && buffer->ndim == 1))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must be int64[n]", what);
    return -1;
}

static int in_range(const Py_buffer *numbers, int64_t lowest, Py_ssize_t size, const char *what)
{
    int good = 1;
    const Py_ssize_t n = numbers->len / 8;
    for (Py_ssize_t i = 0; i < n; i++) {
        int64_t number;
        memcpy(&number, (const char *)numbers->buf + i * 8, 8);
        good &= number >= lowest && number < (int64_t)size;
    }
    if (!good)
        PyErr_Format(PyExc_ValueError, "%s must lie in %d to %zd", what, (int)lowest, size - 1);
    return good;
}

static void release(Py_buffer *buffers, int n)
{
    for (int i = 0; i < n; i++)
        PyBuffer_Release(buffers + i);
}

/* encode(pages, index, reference, reference_index, full, update, out) -> bytes written */
static PyObject *encode(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { PAGES, INDEX, REFERENCE, SLOTS, FULL, OUT, BUFFERS };
    const binding *b = bound(self);
    Py_buffer v[BUFFERS];
    PyObject *result = NULL;
    memset(v, 0, sizeof v);
    if (!b || !count_is(nargs, 7))
        return NULL;
    const int update = PyObject_IsTrue(args[5]);
    if (update < 0 || view_pages(args[0], &v[PAGES], 0, "pages") || view_numbers(args[1], &v[INDEX], 0, "index")
        || view_pages(args[2], &v[REFERENCE], update ? PyBUF_WRITABLE : 0, "reference")
        || view_numbers(args[3], &v[SLOTS], 0, "reference_index") || view(args[4], &v[FULL], "?", 0, "full")
        || PyObject_GetBuffer(args[6], &v[OUT], PyBUF_WRITABLE))
        goto done;
    const Py_ssize_t pages = v[PAGES].len / REMUS_PAGE, references = v[REFERENCE].len / REMUS_PAGE;
    const Py_ssize_t n = args[1] == Py_None ? pages : v[INDEX].len / 8;
    if (!in_range(&v[INDEX], 0, pages, "index") || !in_range(&v[SLOTS], -1, references, "reference_index"))
        goto done;
    if ((args[3] == Py_None ? references != n : v[SLOTS].len / 8 != n) || (args[4] != Py_None && v[FULL].len != n)
        || v[OUT].len / (Py_ssize_t)remus_max_page[b->codec] < n) {
        PyErr_Format(PyExc_ValueError, "references, full and out must suffice for %zd pages", n);
        goto done;
    }
    const remus_batch batch = {v[PAGES].buf, v[INDEX].buf, v[REFERENCE].buf, v[SLOTS].buf, v[FULL].buf, (size_t)n,
                               update};
    size_t size;
    Py_BEGIN_ALLOW_THREADS
    size = b->kernel->codecs[b->codec].encode(&batch, v[OUT].buf);
    Py_END_ALLOW_THREADS
    result = PyLong_FromSize_t(size);
done:
    release(v, BUFFERS);
    return result;
}

/* check(encoded, n) -> bytes that n pages take, or ~offset of the first fault */
static PyObject *check(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    const binding *b = bound(self);
    Py_buffer data;
    if (!b || !count_is(nargs, 2))
        return NULL;
    const Py_ssize_t n = PyLong_AsSsize_t(args[1]);
    if (n < 0) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "n is %zd", n);
        return NULL;
    }
    if (PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE))
        return NULL;
    int64_t taken;
    Py_BEGIN_ALLOW_THREADS
    taken = b->kernel->codecs[b->codec].check(data.buf, (size_t)data.len, (size_t)n);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    return PyLong_FromLongLong(taken);
}

/* apply(encoded, pages, index, checked) -> bytes consumed, or ~offset of the first fault; the pages are untouched then.
 * checked: None, or what check returned for these bytes and as many pages: they are not walked again */
static PyObject *apply(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { DATA, PAGES, INDEX, BUFFERS };
    const binding *b = bound(self);
    Py_buffer v[BUFFERS];
    PyObject *result = NULL;
    memset(v, 0, sizeof v);
    if (!b || !count_is(nargs, 4))
        return NULL;
    const Py_ssize_t checked = args[3] == Py_None ? -1 : PyLong_AsSsize_t(args[3]);
    if (checked < 0 && args[3] != Py_None) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "checked is %zd", checked);
        return NULL;
    }
    if (PyObject_GetBuffer(args[0], &v[DATA], PyBUF_SIMPLE) || view_pages(args[1], &v[PAGES], PyBUF_WRITABLE, "pages")
        || view_numbers(args[2], &v[INDEX], 0, "index"))
        goto done;
    const Py_ssize_t pages = v[PAGES].len / REMUS_PAGE;
    const size_t n = (size_t)(args[2] == Py_None ? pages : v[INDEX].len / 8);
    if (!in_range(&v[INDEX], 0, pages, "index"))
        goto done;
    if (checked > v[DATA].len) {
        PyErr_Format(PyExc_ValueError, "checked is %zd of %zd bytes", checked, v[DATA].len);
        goto done;
    }
    const remus_codec *codec = &b->kernel->codecs[b->codec];
    int64_t taken;
    Py_BEGIN_ALLOW_THREADS
    taken = checked >= 0 ? checked : codec->check(v[DATA].buf, (size_t)v[DATA].len, n);
    if (taken >= 0)
        codec->apply(v[DATA].buf, (size_t)taken, v[PAGES].buf, v[INDEX].buf, n);
    Py_END_ALLOW_THREADS
    result = PyLong_FromLongLong(taken);
done:
    release(v, BUFFERS);
    return result;
}

/* dirty(memory, shadow, found) -> how many page numbers were written to found, which has room for all
 * compare(memory, shadow) -> how many pages differ */
static PyObject *compare(PyObject *self, PyObject *const *args, Py_ssize_t nargs, int list)
{
    enum { MEMORY, SHADOW, FOUND, BUFFERS };
    const binding *b = bound(self);
    Py_buffer v[BUFFERS];
    PyObject *result = NULL;
    memset(v, 0, sizeof v);
    if (!b || !count_is(nargs, list ? 3 : 2))
        return NULL;
    if (view_pages(args[0], &v[MEMORY], 0, "memory") || view_pages(args[1], &v[SHADOW], 0, "shadow")
        || (list && view_numbers(args[2], &v[FOUND], PyBUF_WRITABLE, "found")))
        goto done;
    const Py_ssize_t n = v[MEMORY].len / REMUS_PAGE;
    if (v[SHADOW].len != v[MEMORY].len || (list && v[FOUND].len / 8 < n)) {
        PyErr_Format(PyExc_ValueError, "shadow and found must suffice for %zd pages", n);
        goto done;
    }
    size_t count;
    Py_BEGIN_ALLOW_THREADS
    if (list)
        count = b->kernel->dirty(v[MEMORY].buf, v[SHADOW].buf, (size_t)n, v[FOUND].buf);
    else
        count = b->kernel->compare(v[MEMORY].buf, v[SHADOW].buf, (size_t)n);
    Py_END_ALLOW_THREADS
    result = PyLong_FromSize_t(count);
done:
    release(v, BUFFERS);
    return result;
}

static PyObject *scan_dirty(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return compare(self, args, nargs, 1);
}

static PyObject *scan_compare(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return compare(self, args, nargs, 0);
}

/* filled(pages, found) -> how many page numbers were written to found, which has room for all */
static PyObject *scan_filled(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { PAGES, FOUND, BUFFERS };
    const binding *b = bound(self);
    Py_buffer v[BUFFERS];
    PyObject *result = NULL;
    memset(v, 0, sizeof v);
    if (!b || !count_is(nargs, 2))
        return NULL;
    if (view_pages(args[0], &v[PAGES], 0, "pages") || view_numbers(args[1], &v[FOUND], PyBUF_WRITABLE, "found"))
        goto done;
    const Py_ssize_t n = v[PAGES].len / REMUS_PAGE;
    if (v[FOUND].len / 8 < n) {
        PyErr_Format(PyExc_ValueError, "found must suffice for %zd pages", n);
        goto done;
    }
    size_t count;
    Py_BEGIN_ALLOW_THREADS
    count = b->kernel->filled(v[PAGES].buf, (size_t)n, v[FOUND].buf);
    Py_END_ALLOW_THREADS
    result = PyLong_FromSize_t(count);
done:
    release(v, BUFFERS);
    return result;
}

/* Copies pages between memory, at the places of index, and a buffer with room for as many. */
static PyObject *move(PyObject *self, PyObject *const *args, Py_ssize_t nargs, int gather)
{
    enum { MEMORY, INDEX, PAGES, BUFFERS };
    const binding *b = bound(self);
    Py_buffer v[BUFFERS];
    PyObject *result = NULL;
    memset(v, 0, sizeof v);
    if (!b || !count_is(nargs, 3))
        return NULL;
    if (view_pages(args[0], &v[MEMORY], gather ? 0 : PyBUF_WRITABLE, "memory")
        || view_numbers(args[1], &v[INDEX], 0, "index")
        || view_pages(args[2], &v[PAGES], gather ? PyBUF_WRITABLE : 0, "pages"))
        goto done;
    const size_t n = (size_t)(v[INDEX].len / 8);
    if (!in_range(&v[INDEX], 0, v[MEMORY].len / REMUS_PAGE, "index"))
        goto done;
    if (v[PAGES].len / REMUS_PAGE < (Py_ssize_t)n) {
        PyErr_Format(PyExc_ValueError, "the buffer must suffice for %zu pages", n);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    if (gather)
        b->kernel->gather(v[MEMORY].buf, v[INDEX].buf, n, v[PAGES].buf);
    else
        b->kernel->scatter(v[PAGES].buf, v[INDEX].buf, n, v[MEMORY].buf);
    Py_END_ALLOW_THREADS
    Py_INCREF(Py_None);
    result = Py_None;
done:
    release(v, BUFFERS);
    return result;
}

/* gather(memory, index, out) */
static PyObject *scan_gather(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return move(self, args, nargs, 1);
}

/* scatter(memory, index, pages) */
static PyObject *scan_scatter(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return move(self, args, nargs, 0);
}

/* send(pages, index, numbers, first, cache, held, ages, age, encodes, out, counts) -> bytes written */
static PyObject *send(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { PAGES, INDEX, NUMBERS, CACHE, HELD, AGES, OUT, COUNTS, BUFFERS };
    const binding *b = bound(self);
    Py_buffer v[BUFFERS];
    PyObject *result = NULL;
    memset(v, 0, sizeof v);
    if (!b || !count_is(nargs, 11))
        return NULL;
    const int64_t most = (int64_t)1 << 40; /* pages of a memory: its bytes are a positive int64 */
    const int64_t first = PyLong_AsLongLong(args[3]), age = PyLong_AsLongLong(args[7]);
    const int encodes = PyObject_IsTrue(args[8]);
    if (PyErr_Occurred() || encodes < 0 || view_pages(args[0], &v[PAGES], 0, "pages")
        || view_numbers(args[1], &v[INDEX], 0, "index") || view_numbers(args[2], &v[NUMBERS], 0, "numbers")
        || view_pages(args[4], &v[CACHE], PyBUF_WRITABLE, "cache")
        || view_numbers(args[5], &v[HELD], PyBUF_WRITABLE, "held")
        || view_numbers(args[6], &v[AGES], PyBUF_WRITABLE, "ages")
        || view(args[9], &v[OUT], "B", PyBUF_WRITABLE, "out")
        || view_numbers(args[10], &v[COUNTS], PyBUF_WRITABLE, "counts"))
        goto done;
    const Py_ssize_t pages = v[PAGES].len / REMUS_PAGE, slots = v[HELD].len / 8, n = v[NUMBERS].len / 8;
    if (!in_range(&v[INDEX], 0, pages, "index") || !in_range(&v[NUMBERS], 0, (Py_ssize_t)most, "numbers"))
        goto done;
    if ((args[1] == Py_None ? pages : v[INDEX].len / 8) != n || first < 0 || first > most || (slots & (slots - 1))
        || v[AGES].len != v[HELD].len || v[CACHE].len / REMUS_PAGE != slots || v[COUNTS].len / 8 < REMUS_SENT_COUNTS
        || n > (v[OUT].len - REMUS_SLACK) / REMUS_RECORD_MAX || v[OUT].len < REMUS_SLACK) {
        PyErr_Format(PyExc_ValueError, "index, cache, out and counts must suffice for %zd pages", n);
        goto done;
    }
    const remus_sending sending = {v[PAGES].buf, v[INDEX].buf, v[NUMBERS].buf, (size_t)n,     first,   v[CACHE].buf,
                                   v[HELD].buf,  v[AGES].buf,  (size_t)slots,  age,           encodes, v[COUNTS].buf};
    size_t size;
    Py_BEGIN_ALLOW_THREADS
    size = b->kernel->send(&sending, v[OUT].buf);
    Py_END_ALLOW_THREADS
    result = PyLong_FromSize_t(size);
done:
    release(v, BUFFERS);
    return result;
}

#define FUNCTION(name, function) {name, (PyCFunction)(void (*)(void))(function), METH_FASTCALL, NULL}

static PyMethodDef codec_functions[] = {FUNCTION("encode", encode), FUNCTION("check", check), FUNCTION("apply", apply)};
static PyMethodDef scan_functions[] = {FUNCTION("dirty", scan_dirty), FUNCTION("compare", scan_compare),
                                       FUNCTION("gather", scan_gather), FUNCTION("scatter", scan_scatter),
                                       FUNCTION("filled", scan_filled)};
static PyMethodDef send_functions[] = {FUNCTION("send", send)};

static PyObject *functions_of(binding *to, PyMethodDef *definitions, Py_ssize_t n)
{
    PyObject *self = PyCapsule_New(to, CAPSULE, NULL), *functions = PyTuple_New(n);
    for (Py_ssize_t i = 0; self && functions && i < n; i++) {
        PyObject *function = PyCFunction_NewEx(definitions + i, self, NULL);
        if (!function || PyTuple_SetItem(functions, i, function))
            Py_CLEAR(functions);
    }
    if (!self)
        Py_CLEAR(functions);
    Py_XDECREF(self);
    return functions;
}

static int put(PyObject *dict, const char *key, PyObject *value)
{
    const int failed = !dict || !value || PyDict_SetItemString(dict, key, value);
    Py_XDECREF(value);
    return failed ? -1 : 0;
}

/* kernel name -> {"needs": features, "runs": bool, codec name: (encode, check, apply), "scan": (…), "send": (send,)} */
static PyObject *table(void)
{
    static const char *const names[REMUS_CODECS] = {"delta", "rle", "xbzrle", "xbzrle-fold"};
    PyObject *all = PyDict_New();
    binding *to = bindings;
    for (const remus_kernel *const *k = remus_kernels; all && *k; k++) {
        PyObject *row = PyDict_New();
        int failed = put(row, "needs", PyUnicode_FromString((*k)->needs)) || put(row, "runs", PyBool_FromLong((*k)->runs()));
        for (int codec = 0; !failed && codec < REMUS_CODECS; codec++, to++) {
            to->kernel = *k;
            to->codec = codec;
            failed = put(row, names[codec], functions_of(to, codec_functions, 3));
        }
        failed = failed || put(row, "scan", functions_of(to - 1, scan_functions, 5))
                 || put(row, "send", functions_of(to - 1, send_functions, 1));
        if (failed) {
            Py_XDECREF(row);
            Py_CLEAR(all);
        } else if (put(all, (*k)->name, row)) {
            Py_CLEAR(all);
        }
    }
    return all;
}

/* CPU feature -> whether this machine has it and its operating system lets it be used */
static PyObject *features(void)
{
    PyObject *seen = PyDict_New();
#if REMUS_X86
#define SEEN(name) put(seen, #name, PyBool_FromLong(REMUS_CPU_HAS(name)))
    if (SEEN(popcnt) || SEEN(bmi) || SEEN(bmi2) || SEEN(avx2) || SEEN(avx512f) || SEEN(avx512bw) || SEEN(avx512vl)
        || SEEN(avx512vbmi2))
        Py_CLEAR(seen);
#endif
    return seen;
}

static int execute(PyObject *module)
{
    PyObject *kernels = table(), *seen = features();
    const int failed = !kernels || !seen || PyModule_AddObjectRef(module, "KERNELS", kernels)
                       || PyModule_AddObjectRef(module, "FEATURES", seen)
                       || PyModule_AddStringConstant(module, "SOURCES", REMUS_SOURCES);
    Py_XDECREF(kernels);
    Py_XDECREF(seen);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)execute}, {0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "The native kernels; see kernels.py.", 0, NULL, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module);
}
