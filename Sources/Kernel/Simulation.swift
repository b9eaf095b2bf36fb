#if SIMULATION
    @_silgen_name("memdevd_simulation_step") private func reachStep()
#endif

/// Between two steps in memory that threads share, or that outlives this process: here the simulation (`Tests/Simulation`) lets another thread run, or ends the
/// server. Nothing in any other build.
@inline(__always)
package func simulationStep() {
    #if SIMULATION
        reachStep()
    #endif
}
