import Glibc
import Kernel
import RemoteRAM
import TestSupport
import Testing

extension FaultInjection {
    /// Swap files on disks that fail, fill up, hang: VM `a` has the trouble, VM `b` must not notice.
    @Suite(.serialized, .enabled(if: access("/dev/fuse", R_OK) == 0, "needs FUSE (/dev/fuse)")) struct BadDiskTests {
        private final class Scene {
            let disk: FaultyDisk
            let daemon: RunningDaemon
            let a: RunningVM
            let b: RunningVM
            let server: Int32?

            init(budget: String = "25%") throws {
                disk = try FaultyDisk()
                daemon = try RunningDaemon(["--default-budget", budget], state: disk.path)
                try #require(daemon.isServing)
                // Names of their own: `doctor` looks at all processes of the host.
                a = try RunningVM("a\(getpid())", daemon)
                b = try RunningVM("b\(getpid())", daemon)
                server = daemon.server
            }

            /// On this disk.
            var swapFile: String { a.name + ".swap" }

            /// All of `a` is on the disk.
            func pageOut() throws {
                a.fill(a.all, seed: 1)
                let result = try daemon.control(["evict", a.name])
                #expect(result.status == 0, "\(result)")
            }

            /// `b` pages out and in, and the server is the same.
            func otherLives() {
                b.fill(b.all, seed: 2)
                #expect(b.firstWrong(b.all, seed: 2) == nil)
                #expect(daemon.server == server)
            }

            func end() {
                disk.release()
                #expect(a.detach() && b.detach())
                #expect(daemon.end() == 0, "\(daemon.log)")
            }
        }

        @Test("A page that cannot be read is lost alone, and the operator is told which VM, what and what to do") func readError() throws {
            let scene = try Scene()
            try scene.pageOut()
            let name = scene.swapFile
            scene.disk.set { operation, file, offset, bytes in
                operation == .read && file == name && offset <= 700 << 12 && 700 << 12 < offset + bytes ? .fail(.io) : .pass
            }
            #expect(!scene.a.client.isReadable(700))
            #expect(scene.a.firstWrong(PageRange(0, 700), seed: 1) == nil)
            #expect(scene.a.firstWrong(PageRange(701, scene.a.pages), seed: 1) == nil)
            scene.otherLives()
            #expect(try scene.a.status(scene.daemon).poisoned == 4096)
            #expect(try scene.b.status(scene.daemon).poisoned == 0)
            let errors = scene.daemon.log.split(separator: "\n").filter { $0.contains(" error ") && $0.contains("vm=\(scene.a.name)") }
            #expect(errors.contains { $0.contains("page 700 is lost") }, "\(errors)")
            let doctor = try scene.daemon.control(["doctor"])
            #expect(doctor.status == 1 && doctor.output.contains("VM \(scene.a.name): 4KiB are lost"), "\(doctor)")
            #expect(doctor.output.contains("replace the disk"), "\(doctor)")
            #expect(!doctor.output.contains("VM b\(getpid())"))
            let metrics = try scene.daemon.control(["metrics"])
            #expect(metrics.output.contains("memdevd_poisoned_bytes{vm=\"\(scene.a.name)\"} 4096"), "\(metrics)")
            scene.end()
        }

        @Test("A disk that takes nothing stops paging out, at no page's cost; when it is back all goes on", arguments: [EIO, EROFS]) func writeErrors(
            _ code: Int32
        )
            throws
        {
            let scene = try Scene()
            let name = scene.swapFile
            scene.disk.set { operation, file, _, _ in operation == .write && file == name ? .fail(Errno(code)) : .pass }
            scene.a.fill(scene.a.all, seed: 1)
            #expect(eventually { scene.daemon.log.contains("takes no page") }, "\(scene.daemon.log.suffix(2000))")
            #expect(scene.a.firstWrong(scene.a.all, seed: 1) == nil)
            scene.otherLives()
            let bad = try scene.a.status(scene.daemon)
            #expect(bad.resident > bad.budget && bad.paging.writeErrors > 0)
            let doctor = try scene.daemon.control(["doctor"])
            #expect(doctor.status == 1 && doctor.output.contains("write") && doctor.output.contains("VM \(scene.a.name)"), "\(doctor)")
            scene.disk.release()
            #expect(eventually(within: 30_000) { (try? scene.a.status(scene.daemon)).map { $0.resident <= $0.budget } ?? false })
            #expect(eventually { scene.daemon.log.contains("goes on") })
            #expect(scene.a.firstWrong(scene.a.all, seed: 1) == nil)
            scene.end()
        }

        @Test("A disk that hangs makes its VM wait, nobody else, and the daemon answers; then all goes on") func hang() throws {
            let scene = try Scene()
            try scene.pageOut()
            let name = scene.swapFile
            scene.disk.set { _, file, _, _ in file == name ? .hold : .pass }
            let a = scene.a
            let wrong = Shared<UInt64??>(nil)
            let reader = try Background { wrong.current = .some(a.firstWrong(a.all, seed: 1)) }
            #expect(eventually { scene.disk.heldCount > 0 })
            scene.otherLives()
            #expect(try scene.a.status(scene.daemon).ssd > 0)
            #expect(!reader.isDone)
            scene.disk.release()
            reader.join()
            #expect(wrong.current == .some(nil), "first wrong page")
            scene.end()
        }

        @Test("Writes that hang do not stop the daemon either") func writesHang() throws {
            let scene = try Scene()
            let name = scene.swapFile
            scene.disk.set { operation, file, _, _ in operation == .write && file == name ? .hold : .pass }
            let a = scene.a
            let filler = try Background { a.fill(a.all, seed: 5) }
            #expect(eventually { scene.disk.heldCount > 0 })
            scene.otherLives()
            _ = try scene.a.status(scene.daemon)
            scene.disk.release()
            filler.join()
            #expect(a.firstWrong(a.all, seed: 5) == nil)
            scene.end()
        }

        @Test("A disk that needs a second for each read gives the right pages, and nobody takes the server for stuck") func slow() throws {
            let scene = try Scene()
            try scene.pageOut()
            let name = scene.swapFile
            scene.disk.set { operation, file, _, _ in operation == .read && file == name ? .delay(milliseconds: 1000) : .pass }
            for page in [UInt64(3000), 17, 1200] { #expect(scene.a.firstWrong(PageRange(page, page + 1), seed: 1) == nil) }
            scene.disk.release()
            scene.otherLives()
            #expect(scene.a.firstWrong(scene.a.all, seed: 1) == nil)
            scene.end()
        }

        @Test("The server dies while its disk hangs: the next one goes on when the disk does") func killedWhileHanging() throws {
            let scene = try Scene()
            try scene.pageOut()
            let name = scene.swapFile
            scene.disk.set { operation, file, _, _ in operation == .read && file == name ? .hold : .pass }
            let a = scene.a
            let wrong = Shared<UInt64??>(nil)
            let reader = try Background { wrong.current = .some(a.firstWrong(a.all, seed: 1)) }
            #expect(eventually { scene.disk.heldCount > 0 })
            _ = kill(try #require(scene.server), SIGKILL)
            scene.disk.release()
            reader.join()
            #expect(wrong.current == .some(nil), "first wrong page")
            #expect(scene.daemon.server(after: scene.server) != nil)
            scene.end()
        }

        @Test("SIGTERM while the disk hangs: the server says that it lives, and ends when all is resident") func endWhileHanging() throws {
            let scene = try Scene(budget: "100%")
            try scene.pageOut()
            let name = scene.swapFile
            scene.disk.set { operation, file, _, _ in operation == .read && file == name ? .hold : .pass }
            _ = kill(scene.daemon.pid, SIGTERM)
            #expect(eventually { scene.disk.heldCount > 0 })
            // Longer than the keeper lets a silent server live: no condition says that it has not acted.
            usleep(12_000_000)
            #expect(scene.daemon.server == scene.server)
            #expect(!scene.daemon.log.contains("silent"))
            scene.disk.release()
            #expect(scene.daemon.end() == 0)
            #expect(scene.a.firstWrong(scene.a.all, seed: 1) == nil, "handed back")
        }

        @Test("A file system without O_DIRECT is refused at ATTACH, with what to do") func noDirectIO() throws {
            let directory = TemporaryDirectory()
            try #require(mount("none", directory.path, "ramfs", 0, nil) == 0)
            defer { umount2(directory.path, Int32(MNT_DETACH)) }
            let daemon = try RunningDaemon(state: directory.path)
            defer { withExtendedLifetime(daemon) {} }
            try #require(daemon.isServing)
            let refused = #expect(throws: RunningVM.Refused.self) { _ = try RunningVM("a", daemon) }
            #expect(refused?.text.contains("cannot do O_DIRECT; choose a state directory on a disk") == true, "\(refused?.text ?? "")")
            #expect(daemon.end() == 0, "\(daemon.log)")
        }

        @Test("At a VM's end a file system that is mounted with discard tells its disk which blocks are free", arguments: [false, true])
        func discardedAtTheEnd(encrypts: Bool) throws {
            let directory = TemporaryDirectory()
            let image = directory.path + "/image"
            let mountPoint = TemporaryDirectory()
            let script = "truncate -s 64M \(image) && mkfs.ext4 -q -m 0 \(image) && mount -o loop,discard \(image) \(mountPoint.path)"
            let made = try Command.run(["sh", "-c", script])
            try #require(made.status == 0, "needs loop devices and mkfs.ext4: \(made)")
            defer { _ = try? Command.run(["umount", "-l", mountPoint.path]) }
            let disk = try Descriptor.open(image, flags: O_RDONLY)
            func taken() -> UInt64 { (try? disk.status().occupiedBytes) ?? .max }
            let before = taken()
            let daemon = try RunningDaemon(["--default-budget", "25%", "--encrypt", "\(encrypts)"], state: mountPoint.path)
            defer { withExtendedLifetime(daemon) {} }
            try #require(daemon.isServing)
            let vm = try RunningVM("a", daemon, pages: 4096)
            vm.fill(vm.all, seed: 1)
            let written: UInt64 = 8 << 20
            #expect(eventually { taken() >= before + written })
            #expect(vm.detach())
            // Freed blocks are told when the journal has been written.
            #expect(
                eventually {
                    sync()
                    return taken() < before + written / 2
                }, "\(taken()) of \(before)")
            #expect(daemon.end() == 0, "\(daemon.log)")
        }

        @Test("A full ext4 stops the paging out of all VMs on it, loses nothing, and recovers when there is room") func fullExt4() throws {
            let directory = TemporaryDirectory()
            let image = directory.path + "/image"
            let mountPoint = TemporaryDirectory()
            let script =
                "truncate -s 40M \(image) && mkfs.ext4 -q -m 0 \(image) && mount -o loop \(image) \(mountPoint.path) && fallocate -l 24M \(mountPoint.path)/filler"
            let made = try Command.run(["sh", "-c", script])
            try #require(made.status == 0, "needs loop devices and mkfs.ext4: \(made)")
            defer { _ = try? Command.run(["umount", "-l", mountPoint.path]) }
            let daemon = try RunningDaemon(["--default-budget", "25%"], state: mountPoint.path)
            defer { withExtendedLifetime(daemon) {} }
            try #require(daemon.isServing)
            let vms = [try RunningVM("a", daemon, pages: 4096), try RunningVM("b", daemon, pages: 4096)]
            for (seed, vm) in vms.enumerated() { vm.fill(vm.all, seed: UInt64(seed)) }
            #expect(eventually { daemon.log.contains("no room") }, "\(daemon.log.suffix(1000))")
            for (seed, vm) in vms.enumerated() { #expect(vm.firstWrong(vm.all, seed: UInt64(seed)) == nil) }
            // The server's heir has the same disk.
            let server = daemon.server
            _ = kill(try #require(server), SIGKILL)
            _ = daemon.server(after: server)
            for (seed, vm) in vms.enumerated() { #expect(vm.firstWrong(vm.all, seed: UInt64(seed)) == nil) }
            unlink(mountPoint.path + "/filler")
            for vm in vms { #expect(eventually(within: 30_000) { (try? vm.status(daemon)).map { $0.resident <= $0.budget } ?? false }) }
            for (seed, vm) in vms.enumerated() { #expect(vm.firstWrong(vm.all, seed: UInt64(seed)) == nil) }
            for vm in vms { #expect(vm.detach()) }
            #expect(daemon.end() == 0, "\(daemon.log)")
        }
    }
}
