// orrery-actor: plays episodes of one run.
#include "services/actor/actor_main.h"

int main(int argc, char** argv) { return orrery::ActorMain(argc, argv); }
