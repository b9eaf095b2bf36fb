import ControlAPI
import Testing

@testable import memdevctl

@Suite struct LaunchPlanTests {
    private func plan(
        _ command: String..., budget: Budget? = nil, size: UInt64? = nil, keep: Bool = false, socket: String = "/run/memdevd/control.sock",
        library: String = "/usr/lib/libmemdev.so", preload: String? = nil
    ) throws(Failure) -> LaunchPlan {
        try LaunchPlan(
            vm: "web1", budget: budget, size: size.map { Size(bytes: $0) }, keep: keep, controlSocket: socket, library: library,
            command: command.flatMap { $0.split(separator: " ").map(String.init) }, inheritedPreload: preload)
    }

    private func refusal(_ command: String, budget: Budget? = nil, size: UInt64? = nil, library: String = "/l.so") -> String {
        let failure = #expect(throws: Failure.self) { try plan(command, budget: budget, size: size, library: library) }
        #expect(failure?.status == .usage)
        return failure?.message ?? ""
    }

    private let added512 = [
        "-object", "memory-backend-file,id=memdev,size=536870912,share=on,mem-path=/run/memdevd/vm/web1", "-machine",
        "memory-backend=memdev",
    ]

    @Test("A command gets the library and its variables") func environment() throws {
        let environment = try plan("cloud-hypervisor --x", keep: true).environment
        #expect(
            environment.map { "\($0.name)=\($0.value)" } == [
                "LD_PRELOAD=/usr/lib/libmemdev.so", "MEMDEV_PRELOAD=1", "MEMDEV_SOCKET=/run/memdevd/memdevd.sock", "MEMDEV_VM=web1",
                "MEMDEV_PATH=/run/memdevd/vm/web1", "MEMDEV_FLAGS=keep",
            ])
        #expect(try plan("x").environment.contains { $0.name == "MEMDEV_FLAGS" } == false)
    }

    @Test("A VM with a socket of its own connects there, and its memory keeps its path") func ownSocket() throws {
        let plan = try LaunchPlan(
            vm: "web1", budget: nil, size: nil, keep: false, controlSocket: "/run/memdevd/control.sock", vmmSocket: "/run/memdevd/sockets/web1.sock",
            library: "/l.so", command: ["x"], inheritedPreload: nil)
        #expect(plan.environment.first { $0.name == "MEMDEV_SOCKET" }?.value == "/run/memdevd/sockets/web1.sock")
        #expect(plan.environment.first { $0.name == "MEMDEV_PATH" }?.value == "/run/memdevd/vm/web1")
    }

    @Test("Libraries that were preloaded already come after ours") func prepends() throws {
        #expect(try plan("x", preload: "/a.so:/b.so").environment[0].value == "/usr/lib/libmemdev.so:/a.so:/b.so")
    }

    @Test("A socket elsewhere moves everything with it") func otherDirectory() throws {
        let values = try plan("qemu-system-x86_64", socket: "/tmp/x/control.sock").environment.map(\.value)
        #expect(values.contains("/tmp/x/memdevd.sock") && values.contains("/tmp/x/vm/web1"))
    }

    @Test("A command that is not QEMU is left as it is") func otherCommand() throws {
        #expect(try plan("firecracker --api-sock s -m 512").command == ["firecracker", "--api-sock", "s", "-m", "512"])
    }

    @Test(
        "QEMU gets a memory backend of the size that -m says",
        arguments: [
            "-m 512", "-m 512M", "--m 0.5G", "-m size=512M", "-m size=512M,slots=2,maxmem=4G", "-m 512,slots=2,maxmem=4G", "-m 64 -m 512",
            "-m 524288K",
        ])
    func addsBackend(arguments: String) throws {
        let plan = try plan("/usr/bin/qemu-system-x86_64 -machine q35 \(arguments)")
        #expect(Array(plan.command.suffix(4)) == added512)
        #expect(plan.notes.contains { $0.hasPrefix("added: -object") })
    }

    @Test("QEMU without -m has its default size") func defaultSize() throws {
        #expect(try plan("qemu-system-x86_64").command.contains { $0.contains("size=134217728,") })
        #expect(try plan("qemu-kvm", size: 512 << 20).command.suffix(4) == added512[...])
    }

    @Test(
        "A backend that the command has already is used if it is ours",
        arguments: [
            "-object memory-backend-file,id=ram,size=1G,share=on,mem-path=/run/memdevd/vm/web1 -machine memory-backend=ram",
            #"-object {"qom-type":"memory-backend-file","id":"ram","size":1073741824,"share":true,"mem-path":"/run/memdevd/vm/web1"} -M pc,memory-backend=ram"#,
        ])
    func ownBackend(arguments: String) throws {
        let command = "qemu-system-x86_64 -m 1G \(arguments)"
        #expect(try plan(command).command.joined(separator: " ") == command)
    }

    @Test(
        "A backend elsewhere, or a private one, is refused",
        arguments: [
            ("-object memory-backend-ram,id=ram,size=1G", "memdevd would own nothing"),
            ("-object memory-backend-file,id=ram,size=1G,share=on,mem-path=/run/memdevd/vm/web10", "memdevd would own nothing"),
            ("-machine pc,memory-backend=ram", "memdevd would own nothing"),
            ("-object memory-backend-file,id=ram,size=1G,mem-path=/run/memdevd/vm/web1", "has no share=on"),
            ("-object memory-backend-file,id=ram,size=1G,share=off,mem-path=/run/memdevd/vm/web1", "has no share=on"),
        ])
    func foreignBackend(arguments: String, reason: String) {
        #expect(refusal("qemu-system-x86_64 -m 1G \(arguments)").contains(reason))
    }

    @Test("A size that is wrong, contradicted or out of sight is refused") func refusesSize() {
        #expect(refusal("qemu-system-x86_64 -m lots").contains("-m lots:"))
        #expect(refusal("qemu-system-x86_64 -m 0").contains("a VM needs memory"))
        #expect(refusal("qemu-system-x86_64 -m 1G", size: 2 << 30).contains("--size 2GiB contradicts -m 1G"))
        #expect(refusal("qemu-system-x86_64 -readconfig f").contains("add -m or --size"))
    }

    @Test("A percentage budget follows the size that can be seen") func percentageBudget() throws {
        #expect(try plan("qemu-system-x86_64 -m 1G", budget: .percent(50)).budgetBytes == 512 << 20)
        #expect(try plan("vmm", budget: .percent(50), size: 2 << 30).budgetBytes == 1 << 30)
        #expect(try plan("vmm", budget: .bytes(1 << 30)).budgetBytes == 1 << 30)
        #expect(try plan("vmm").budgetBytes == nil)
        #expect(refusal("vmm", budget: .percent(50)).contains("add --size"))
    }

    @Test("A program that cleans the environment is refused", arguments: ["sudo", "/usr/bin/doas", "pkexec"]) func refusesWrapper(
        program: String
    ) {
        #expect(refusal("\(program) qemu-system-x86_64").contains("drops LD_PRELOAD"))
    }

    @Test("A library whose path cannot be preloaded is refused", arguments: ["/a b/l.so", "/a:b/l.so"]) func refusesLibraryPath(
        library: String
    ) {
        #expect(refusal("vmm", library: library).contains("a space or a colon"))
    }

    @Test("The plan can be pasted into a shell") func shellText() {
        #expect(Shell.join(["a", "", "b c", "it's", "$x", "k=v,/p"]) == "a '' 'b c' 'it'\\''s' '$x' k=v,/p")
    }
}
