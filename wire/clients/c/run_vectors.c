/* Runs every vector of the directory in argv[1] against wrenn_wire.c; a server's are not for it. */
#define _POSIX_C_SOURCE 200809L
#include "wrenn_wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int ran, failed;

/* The text of a key's value on this line: a string without its quotes, or up to the line's end. */
static const char *value(const char *line, const char *key, size_t *length) {
    char wanted[32];
    const char *at;
    snprintf(wanted, sizeof wanted, "\"%s\":", key);
    at = strstr(line, wanted);
    if (!at) return NULL;
    at += strlen(wanted);
    if (*at == '"') at++;
    *length = strcspn(at, "\"");
    return at;
}

static size_t from_hex(const char *text, size_t length, uint8_t *out) {
    for (size_t i = 0; i < length / 2; i++) {
        unsigned byte = 0;
        sscanf(text + 2 * i, "%2x", &byte);
        out[i] = (uint8_t)byte;
    }
    return length / 2;
}

static void result(const char *line, int is_right, const char *found) {
    size_t n = 0;
    const char *name = value(line, "name", &n);
    ran++;
    if (is_right) return;
    failed++;
    printf("%.*s: %s\n", (int)n, name, found ? found : "no error");
}

static int is_error(const char *line, const char *found) {
    size_t n;
    const char *wanted = value(line, "error", &n);
    if (!wanted) return found == NULL;
    return found && strlen(found) == n && !strncmp(found, wanted, n);
}

static void message(const char *line) {
    static uint8_t body[1 << 16];
    size_t n;
    const char *hex = value(line, "hex", &n), *decoded = strstr(line, "\"decoded\":{"), *error;
    size_t length = from_hex(hex, n, body);
    struct wrenn_buffer json = {0};
    int is_right;
    error = wrenn_check_message((uint16_t)atoi(value(line, "kind", &n)), body, length, &json);
    is_right = is_error(line, error);
    if (decoded && is_right) {
        /* Fields may be in any order: each is there, and together they are as long. */
        size_t total = 0;
        const char *at, *end;
        wrenn_put(&json, "", 1);
        decoded += 11;
        for (at = (const char *)json.data; *at; at = end + 1) {
            char *field;
            int depth = 0, quoted = 0;
            for (end = at; *end && (depth || quoted || *end != ','); end++) {
                if (*end == '"') quoted = !quoted;
                if (!quoted) depth += (*end == '[') - (*end == ']');
            }
            field = strndup(at, (size_t)(end - at));
            if (!field || !strstr(decoded, field)) is_right = 0;
            total += (size_t)(end - at) + 1;
            free(field);
        }
        if (total && strncmp(decoded + total - 1, "},", 2)) is_right = 0;
        error = (const char *)json.data;
    }
    result(line, is_right, error);
    wrenn_free(&json);
}

static void frame(const char *line) {
    uint8_t bytes[12];
    char decoded[128];
    struct wrenn_header h;
    size_t n;
    const char *hex = value(line, "hex", &n), *error;
    from_hex(hex, n, bytes);
    error = wrenn_check_header(bytes, &h);
    snprintf(decoded, sizeof decoded, "{\"fin\":%s,\"length\":%u,\"stream\":%u,\"type\":%u}", h.fin ? "true" : "false",
             h.length, h.stream, h.type);
    result(line, is_error(line, error) && (error || strstr(line, decoded)), error ? error : decoded);
}

static void handshake(const char *line) {
    static uint8_t bytes[1 << 16];
    char identity[129], program[129];
    uint8_t secret[256], nonce[18];
    size_t n, secret_length;
    const char *at = value(line, "side", &n), *error = NULL, *output;
    struct wrenn_client *c;
    int is_right;
    if (strncmp(at, "client", 6)) return;
    at = value(line, "identity", &n);
    snprintf(identity, sizeof identity, "%.*s", (int)n, at);
    at = value(line, "program", &n);
    snprintf(program, sizeof program, "%.*s", (int)n, at);
    at = value(line, "secret", &n);
    secret_length = from_hex(at, n, secret);
    at = value(line, "nonce", &n);
    from_hex(at, n, nonce);
    c = wrenn_new(identity, secret, secret_length, program, nonce);
    if (!c) abort();
    at = strstr(line, "\"before\":[") + 10;
    while (*at == '"' || *at == ',') {
        if (*at++ == ',') continue;
        n = strcspn(at, "\"");
        wrenn_output(c)->length = 0;
        error = wrenn_receive(c, bytes, from_hex(at, n, bytes));
        at += n + 1;
    }
    at = value(line, "hex", &n);
    if (n) {
        wrenn_output(c)->length = 0;
        error = wrenn_receive(c, bytes, from_hex(at, n, bytes));
    }
    is_right = is_error(line, error);
    if ((output = value(line, "output", &n)) && is_right) {
        size_t length = from_hex(output, n, bytes);
        is_right = wrenn_output(c)->length == length && (!length || !memcmp(wrenn_output(c)->data, bytes, length));
        error = "other output";
    }
    result(line, is_right, error);
    wrenn_close(c);
}

static void run(const char *directory, const char *file, void (*each)(const char *)) {
    char path[4096];
    char *line = NULL;
    size_t capacity = 0;
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", directory, file);
    if (!(f = fopen(path, "r"))) {
        perror(path);
        exit(1);
    }
    while (getline(&line, &capacity, f) > 0)
        if (*line == '{') each(line);
    free(line);
    fclose(f);
}

int main(int argc, char **argv) {
    const char *directory = argc > 1 ? argv[1] : "wire/vectors";
    run(directory, "messages.json", message);
    run(directory, "frames.json", frame);
    run(directory, "handshake.json", handshake);
    printf("c: %d vectors, %d failed\n", ran, failed);
    return failed || !ran;
}
