#include "cli/command.h"

#include "base/cpu_isa.h"
#include "base/log.h"
#include "cli/signals.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

static const ra_command_t commands[] = {
    {.name = "score",
     .bit = RA_FOR_SCORE,
     .synopsis = "score [--model DIR] --in FILE [--out DIR] [flags]",
     .doc = "log-likelihood and perplexity of documents, resumable",
     .more = "example: ringattn score --in docs.jsonl --out run1 --ranks 4 --token-logprobs npy\n"
             "Without --out the rows go to stdout. With --out the directory gets scores.jsonl,\n"
             "errors.jsonl and summary.json, and the same command again goes on where it ended.\n"
             "SIGTERM and SIGUSR1 stop it (exit 75); what is done is saved.",
     .run = ra_cmd_score},
    {.name = "prefill",
     .bit = RA_FOR_PREFILL,
     .synopsis = "prefill [--model DIR] --in FILE [--out DIR] [--continue DIR] [flags]",
     .doc = "key/value cache and states of a document, and its likely next tokens",
     .more = "example: ringattn prefill --in book.txt --out cache1 --ranks 4\n"
             "         ringattn prefill --in more.txt --continue cache1 --out cache2 --ranks 2",
     .run = ra_cmd_prefill},
    {.name = "tokenize",
     .bit = RA_FOR_TOKENIZE,
     .synopsis = "tokenize [--model DIR] --in FILE [--json]",
     .doc = "token ids of documents",
     .more = "example: ringattn tokenize --in docs.jsonl --json > tokens.jsonl\n"
             "Bad rows are reported on stderr with line and id (exit 3).",
     .run = ra_cmd_tokenize},
    {.name = "validate",
     .bit = RA_FOR_VALIDATE,
     .synopsis = "validate [--model DIR] [--in FILE] [--json]",
     .doc = "check a model directory, and data for it, without computing",
     .more = "example: ringattn validate --model ./my-model --in docs.jsonl",
     .run = ra_cmd_validate},
    {.name = "doctor",
     .bit = RA_FOR_DOCTOR,
     .synopsis = "doctor [--json]",
     .doc = "report on this machine and test what a job needs of it",
     .more = "example: ringattn doctor",
     .run = ra_cmd_doctor},
    {.name = "config",
     .bit = RA_FOR_CONFIG | RA_FOR_ALL,
     .synopsis = "config [flags] [--json]",
     .doc = "every setting with its value and where the value came from",
     .more = "example: ringattn config --config run.conf\n"
             "The output is itself a configuration file. Precedence: flag, environment, file, "
             "default.",
     .run = ra_cmd_config},
    {.name = "version",
     .bit = RA_FOR_VERSION,
     .synopsis = "version [--json]",
     .doc = "version, commit and features of this build",
     .more = "example: ringattn version --json",
     .run = ra_cmd_version},
};

static const char *command_at(int index)
{
    return commands[index].name;
}

const ra_command_t *ra_command_find(const char *name)
{
    for (size_t i = 0; i < RA_ARRAY_LEN(commands); i++) {
        if (strcmp(commands[i].name, name) == 0) {
            return &commands[i];
        }
    }
    return NULL;
}

ra_status_t ra_flush_stdout(void)
{
    if (fflush(stdout) != 0 || ferror(stdout)) {
        return ra_fail(RA_ERR_OUTPUT, "output", "stdout cannot be written: %s", strerror(errno));
    }
    return RA_OK;
}

static void print_usage(FILE *out)
{
    fprintf(out, "usage: ringattn <command> [flags]\n\n"
                 "Runs language models over sequences too long for one device.\n\ncommands:\n");
    for (size_t i = 0; i < RA_ARRAY_LEN(commands); i++) {
        fprintf(out, "  %-10s%s\n", commands[i].name, commands[i].doc);
    }
    fprintf(out,
            "  %-10s%s\n\n"
            "`ringattn <command> --help` lists its flags. Every flag is also a setting of a file\n"
            "given with --config and of the environment; `ringattn config` lists them all.\n\n"
            "exit codes: 0 done, 1 internal error, 2 usage, 3 done but some rows failed,\n"
            "  4 input rejected, 5 does not fit in memory, 6 a rank failed, 7 integrity or\n"
            "  non-finite result, 8 output cannot be written, 75 stopped on request with progress\n"
            "  saved, 130 interrupted\n",
            "help", "this text, or the help of a command");
}

static int print_help(const ra_command_t *command)
{
    printf("usage: ringattn %s\n\n%s\n\nflags:\n", command->synopsis, command->doc);
    ra_settings_help(stdout, command->bit);
    printf("\n%s\n", command->more);
    return ra_status_exit_code(ra_flush_stdout());
}

static ra_status_t apply(const ra_settings_t *settings)
{
    ra_log_level_t level = RA_LOG_WARN;
    const char *isa = ra_settings_text(settings, RA_SET_CPU_ISA);
    ra_log_level_parse(ra_settings_text(settings, RA_SET_LOG_LEVEL), &level);
    ra_log_set_level(level);
    for (int i = 0; i < RA_CPU_ISA_COUNT; i++) {
        if (strcmp(isa, ra_cpu_isa_name((ra_cpu_isa_t)i)) == 0 &&
            ra_cpu_isa_force((ra_cpu_isa_t)i) != 0) {
            return ra_fail(RA_ERR_UNSUPPORTED, "device", "--cpu-isa %s: this machine lacks it",
                           isa);
        }
    }
    return RA_OK;
}

static int run_command(const ra_command_t *command, int argc, char **argv)
{
    ra_settings_t *settings = NULL;
    bool help = false;
    ra_status_t status = ra_settings_create(&settings);
    if (status == RA_OK) {
        status = ra_settings_load(settings, command->bit, argc, argv, &help);
    }
    if (status == RA_OK && help) {
        ra_settings_destroy(settings);
        return print_help(command);
    }
    if (status == RA_OK) {
        status = apply(settings);
    }
    if (status == RA_OK) {
        ra_signals_install();
        status = command->run(settings);
    }
    ra_settings_destroy(settings);
    if (status == RA_ERR_STOPPED && ra_signals_status() != RA_OK) {
        status = ra_signals_status(); /* which signal it was */
    }
    return ra_status_exit_code(status);
}

static int unknown_command(const char *name)
{
    const char *nearest = ra_nearest_word(name, (int)RA_ARRAY_LEN(commands), command_at);
    return ra_status_exit_code(
        ra_fail(RA_ERR_USAGE, "command", "unknown command '%s'%s%s%s (ringattn help lists them)",
                name, nearest != NULL ? "; did you mean '" : "", nearest != NULL ? nearest : "",
                nearest != NULL ? "'?" : ""));
}

int ra_command_main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";
    if (name[0] == '\0') {
        print_usage(stderr);
        return ra_status_exit_code(RA_ERR_USAGE);
    }
    if (strcmp(name, "help") == 0 || strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
        if (argc > 2) {
            const ra_command_t *about = ra_command_find(argv[2]);
            return about != NULL ? print_help(about) : unknown_command(argv[2]);
        }
        print_usage(stdout);
        return ra_status_exit_code(ra_flush_stdout());
    }
    if (strcmp(name, "--version") == 0) {
        name = "version";
    }
    const ra_command_t *command = ra_command_find(name);
    return command != NULL ? run_command(command, argc - 2, argv + 2) : unknown_command(name);
}
