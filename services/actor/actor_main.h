// The program orrery-actor as a function, for programs that bring environments of their own.
#pragma once

namespace orrery {

// Plays episodes of one run until it is complete or a signal ends it; returns the exit status. What was registered with
// RegisterEnvironment before can be played. Call it once, from main.
int ActorMain(int argc, char** argv);

}  // namespace orrery
