#include "cli/command.h"

int main(int argc, char **argv)
{
    return ra_command_main(argc, argv);
}
